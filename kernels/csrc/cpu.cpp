// The CPU backend: the ops of vae_fast/ops.py over the passes of latent.h and likelihood.h.
//
// Written against LibTorch's stable ABI, so one binary serves every torch ≥ 2.10. The passes are
// compiled for each instruction set below, and the best one is chosen when the library is loaded.

#include <tuple>

#include "lanes.h"
#include "operand.h"

namespace vae_fast {

#if defined(__x86_64__)
#define VAE_FAST_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
namespace avx512 {
#include "latent.h"
#include "likelihood.h"
}  // namespace avx512
#undef VAE_FAST_TARGET
#define VAE_FAST_TARGET __attribute__((target("arch=x86-64-v3")))
namespace avx2 {
#include "latent.h"
#include "likelihood.h"
}  // namespace avx2
#undef VAE_FAST_TARGET
#endif
#define VAE_FAST_TARGET
namespace base {  // SSE2 on x86-64, NEON on AArch64
#include "latent.h"
#include "likelihood.h"
}  // namespace base
#undef VAE_FAST_TARGET

namespace {

// ---- the instruction set ---------------------------------------------------------------------

enum class Isa { base, avx2, avx512 };

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::base;
}
const Isa kIsa = best_isa();

template <class T>
LatentKernels<T> latent_kernels(Param param);
template <>
LatentKernels<double> latent_kernels(Param param) {
  return base::latent_kernels<double>(param);
}
template <>
LatentKernels<float> latent_kernels(Param param) {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return avx512::latent_kernels<f32x16>(param);
  if (kIsa == Isa::avx2) return avx2::latent_kernels<f32x8>(param);
#endif
  return base::latent_kernels<f32x4>(param);
}

template <class T>
LikelihoodPiece<T> likelihood_kernel(Param param, bool scalar, bool gradient);
template <>
LikelihoodPiece<double> likelihood_kernel(Param param, bool scalar, bool gradient) {
  return base::likelihood_kernel<double>(param, scalar, gradient);
}
template <>
LikelihoodPiece<float> likelihood_kernel(Param param, bool scalar, bool gradient) {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return avx512::likelihood_kernel<f32x16>(param, scalar, gradient);
  if (kIsa == Isa::avx2) return avx2::likelihood_kernel<f32x8>(param, scalar, gradient);
#endif
  return base::likelihood_kernel<f32x4>(param, scalar, gradient);
}

// ---- latent pass -----------------------------------------------------------------------------

// A latent tensor as rows with one element stride, copied only where its strides allow no such view.
// The order of latent elements is the order of the noise, so no dimension moves.
struct LatentOperand : Operand {
  LatentOperand() = default;
  explicit LatentOperand(const Tensor& t, int64_t event_from = 1) : owner_(t) {
    if (!straighten(event_from)) {
      owner_ = torch::stable::contiguous(t);
      straighten(event_from);
    }
  }

  // n elements of each row as T: in place where they already are so, else gathered into `buffer`.
  template <class T>
  Rows<const T> load(int64_t offset, int64_t rows, int64_t begin, int64_t n, T* buffer) const {
    const int64_t stride = strides[0];
    offset += begin * stride;
    if (type == type_of<T> && stride == 1) {
      return {reinterpret_cast<const T*>(at(offset)), row_stride};
    }
    const bool joined = row_stride == n * stride;
    for (int64_t row = 0; row < (joined ? 1 : rows); ++row) {
      gather(*this, offset + row * row_stride, stride, joined ? rows * n : n, buffer + row * n);
    }
    return {buffer, n};
  }

 private:
  bool straighten(int64_t event_from) {
    static_cast<Operand&>(*this) = operand(*owner_, event_from);
    Event event = event_of(*owner_, event_from);
    event.fuse<1>({this}, /*reorder=*/false);
    return event.sizes.size() == 1;
  }
  OptionalTensor owner_;
};

// What both directions share: μ and the scale by rows of L elements, and the noise of a group of
// rows. Short rows are grouped, since rows and samples that follow each other have one run of noise.
template <class T>
struct Latent {
  static constexpr int64_t kLanes = sizeof(T) == 4 ? 4 : 2;  // normals per Philox call
  static constexpr int64_t kCalls = kTile / kLanes;          // Philox calls per tile

  int64_t batch, samples, size, calls, group, together, first_row;
  uint64_t seed, offset;
  bool scalar;
  LatentOperand mu, scale;
  T shared[kTile];  // a 0-dim scale, repeated
  LatentKernels<T> kernels;
  Clamp clamp;

  Latent(const Tensor& mu_, const Tensor& scale_, const Tensor& key, int64_t num_samples,
         int64_t first_row_, int64_t param, double lo, double hi)
      : batch(mu_.size(0)),
        samples(std::max<int64_t>(num_samples, 1)),
        size(event_of(mu_).numel()),
        calls((size + kLanes - 1) / kLanes),
        group(std::max<int64_t>(1, kCalls / std::max<int64_t>(1, calls * samples))),
        together(std::clamp<int64_t>(kCalls / std::max<int64_t>(1, calls), 1, samples)),
        first_row(first_row_),
        scalar(scale_.dim() == 0),
        mu(mu_),
        kernels(latent_kernels<T>(static_cast<Param>(param))),
        clamp{lo, hi} {
    if (scalar) {
      std::fill(shared, shared + std::min(size, kTile), scalar_value<T>(scale_));
    } else {
      scale = LatentOperand(scale_);
    }
    const uint64_t* bits = static_cast<const uint64_t*>(key.const_data_ptr());
    seed = bits[0];
    offset = bits[key.stride(0)];
  }

  // Calls fn(b, rows, begin, n) for the tiles of the latent: `rows` whole rows from row b on, or n
  // elements from `begin` of one long row; in parallel over rows, in order within one.
  template <class Fn>
  void for_tiles(const Fn& fn) const {
    const int64_t cost = 4 * group * std::max<int64_t>(size, 1) * samples;
    torch::stable::parallel_for(
        0, (batch + group - 1) / group, std::max<int64_t>(1, kGrain / cost),
        [&](int64_t first, int64_t last) {
          for (int64_t g = first; g < last; ++g) {
            const int64_t b = g * group, rows = std::min(group, batch - b);
            for (int64_t begin = 0; begin < size; begin += kTile) {
              fn(b, rows, begin, std::min(size - begin, kTile));
            }
          }
        });
  }

  // Calls fn(k, eps) for every sample k of a tile, with its noise.
  template <class Fn>
  void for_samples(int64_t b, int64_t rows, int64_t begin, const Fn& fn) const {
    alignas(64) T eps[kTile + 64];  // room for the last block of 16 counters
    const int64_t per_row = std::min(calls - begin / kLanes, kCalls);
    for (int64_t first = 0; first < samples; first += together) {
      const int64_t count = std::min(together, samples - first);
      const uint64_t row = (uint64_t(first_row) + b) * samples + first;
      kernels.noise(rows * count * per_row, offset + row * calls + begin / kLanes,
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), eps);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t pitch = per_row * kLanes;
        fn(first + k, Rows<const T>{eps + k * pitch, count * pitch});
      }
    }
  }

  Rows<const T> load_mu(int64_t b, int64_t rows, int64_t begin, int64_t n, T* buffer) const {
    return mu.load(b * mu.row_stride, rows, begin, n, buffer);
  }
  // The clamped scale, and which elements' gradients that makes zero.
  Rows<const T> load_scale(int64_t b, int64_t rows, int64_t begin, int64_t n, T* buffer,
                           bool* zero) const {
    const Rows<const T> raw = scalar ? Rows<const T>{shared, 0}
                                     : scale.load(b * scale.row_stride, rows, begin, n, buffer);
    if (!clamp.active()) return raw;
    for (int64_t row = 0; row < rows; ++row) {
      clamp.apply(raw[row], n, buffer + row * n, zero + row * n);
    }
    return {buffer, n};
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> latent_forward_as(const Tensor& mu, const Tensor& scale,
                                                     const Tensor& key, int64_t num_samples,
                                                     int64_t first_row, int64_t param, double lo,
                                                     double hi) {
  const Latent<T> latent(mu, scale, key, num_samples, first_row, param, lo, hi);
  Dims rows, shape;
  if (num_samples > 0) {
    rows.push_back(num_samples);
    shape.push_back(num_samples);
  }
  rows.push_back(latent.batch);
  shape.append(mu.sizes());
  Tensor z = empty(shape, mu.scalar_type());
  Tensor log_q = empty(rows, type_of<T>), log_p = empty(rows, type_of<T>);
  T* const q = data_of<T>(log_q);
  T* const p = data_of<T>(log_p);
  const int64_t count = latent.samples * latent.batch;
  std::fill(q, q + count, static_cast<T>(-kHalfLog2Pi * latent.size));
  std::fill(p, p + count, static_cast<T>(-kHalfLog2Pi * latent.size));

  const Output<T> out(z);
  latent.for_tiles([&](int64_t b, int64_t group, int64_t begin, int64_t n) {
    alignas(64) T mu_tile[kTile], scale_tile[kTile], z_tile[kTile];
    bool zero[kTile];
    const Rows<const T> mus = latent.load_mu(b, group, begin, n, mu_tile);
    const Rows<const T> scales = latent.load_scale(b, group, begin, n, scale_tile, zero);
    latent.for_samples(b, group, begin, [&](int64_t k, Rows<const T> eps) {
      const int64_t row = k * latent.batch + b, at = row * latent.size + begin;
      T* const to = out.target(at, z_tile);
      latent.kernels.forward(group, n, mus, scales, eps, {to, n}, q + row, p + row);
      out.store(at, group * n, to);
    });
  });
  return {z, log_q, log_p};
}

std::tuple<Tensor, Tensor, Tensor> latent_forward(Tensor mu, Tensor scale, Tensor key,
                                                  int64_t num_samples, int64_t first_row,
                                                  int64_t param, double lo, double hi) {
  const auto run = is_double(mu) ? latent_forward_as<double> : latent_forward_as<float>;
  return run(mu, scale, key, num_samples, first_row, param, lo, hi);
}

template <class T>
std::tuple<Tensor, Tensor> latent_backward_as(const OptionalTensor& g_z,
                                              const OptionalTensor& g_log_q,
                                              const OptionalTensor& g_log_p, const Tensor& mu,
                                              const Tensor& scale, const Tensor& key,
                                              int64_t num_samples, int64_t first_row, int64_t param,
                                              double lo, double hi) {
  const Latent<T> latent(mu, scale, key, num_samples, first_row, param, lo, hi);
  Tensor g_mu = empty(dims_of(mu), mu.scalar_type());
  Tensor g_scale = latent.scalar ? none(type_of<T>) : empty(dims_of(mu), scale.scalar_type());
  const Output<T> out_mu(g_mu), out_scale(g_scale);
  std::vector<T> g_shared(latent.scalar ? latent.batch : 0, T(0));

  LatentOperand upstream;
  int64_t sample_stride = 0;
  if (g_z) {
    upstream = LatentOperand(*g_z, num_samples > 0 ? 2 : 1);
    // A copied operand is contiguous; otherwise the sample dimension has a stride of its own.
    const bool copied = upstream.data != g_z->const_data_ptr();
    if (num_samples > 0) sample_stride = copied ? latent.batch * latent.size : g_z->stride(0);
  }
  const OptionalTensor flat_q = flat(g_log_q), flat_p = flat(g_log_p);
  const RowValues<T> q(flat_q), p(flat_p);

  latent.for_tiles([&](int64_t b, int64_t group, int64_t begin, int64_t n) {
    alignas(64) T mu_tile[kTile], scale_tile[kTile], z_tile[kTile], gm_tile[kTile], gs_tile[kTile];
    bool zero[kTile];
    const Rows<const T> mus = latent.load_mu(b, group, begin, n, mu_tile);
    const Rows<const T> scales = latent.load_scale(b, group, begin, n, scale_tile, zero);
    const int64_t at = b * latent.size + begin;
    T* const gm = out_mu.target(at, gm_tile);
    T* const gs = latent.scalar ? gs_tile : out_scale.target(at, gs_tile);
    if (!g_z) std::fill(z_tile, z_tile + n, T(0));
    latent.for_samples(b, group, begin, [&](int64_t k, Rows<const T> eps) {
      Rows<const T> g_zs{z_tile, 0};
      if (g_z) {
        const int64_t from = k * sample_stride + b * upstream.row_stride;
        g_zs = upstream.load(from, group, begin, n, z_tile);
      }
      const int64_t row = k * latent.batch + b;
      latent.kernels.backward(group, n, mus, scales, eps, g_zs, q.from(row), p.from(row), {gm, n},
                              {gs, n}, /*add=*/k > 0);
    });
    if (latent.clamp.active()) zero_where(zero, group * n, gs);
    out_mu.store(at, group * n, gm);
    if (!latent.scalar) out_scale.store(at, group * n, gs);
    for (int64_t i = 0; latent.scalar && i < group; ++i) {
      g_shared[b + i] += tree_sum<T>(i * n, (i + 1) * n, [&](int64_t j) { return gs[j]; });
    }
  });
  if (latent.scalar) {
    g_scale = scalar_tensor(tree_sum<T>(0, latent.batch, [&](int64_t b) { return g_shared[b]; }),
                            scale.scalar_type());
  }
  return {g_mu, g_scale};
}

std::tuple<Tensor, Tensor> latent_backward(OptionalTensor g_z, OptionalTensor g_log_q,
                                           OptionalTensor g_log_p, Tensor mu, Tensor scale,
                                           Tensor key, int64_t num_samples, int64_t first_row,
                                           int64_t param, double lo, double hi) {
  const auto run = is_double(mu) ? latent_backward_as<double> : latent_backward_as<float>;
  return run(g_z, g_log_q, g_log_p, mu, scale, key, num_samples, first_row, param, lo, hi);
}

// ---- likelihood pass -------------------------------------------------------------------------

// The order is the op schema's integer code; vae_fast/ops.py holds the same list.
enum class Reduction : int64_t { mean, sum, none, no_loss };

// ∂loss/∂(row's term), for an upstream gradient of one.
template <class T>
T row_share(int64_t rows, int64_t samples, Reduction reduction) {
  if (reduction == Reduction::no_loss) return T(0);
  return T(1) / static_cast<T>(reduction == Reduction::mean ? std::max<int64_t>(rows, 1) : samples);
}

// The operands of one likelihood op and the loop over them.
template <class T>
struct Likelihood {
  int64_t batch, rows, samples, size, pieces;
  bool scalar, need_x = false;
  Event event;
  Operand x, mean, scale, mask, g_x, g_mean, g_scale;
  T shared = T(0);        // a 0-dim scale, clamped
  T shared_slope = T(1);  // and its clamp's derivative
  Param param;
  Clamp clamp;

  Likelihood(const Tensor& x_, const Tensor& mean_, const OptionalTensor& scale_,
             const OptionalTensor& mask_, int64_t param_, double lo, double hi)
      : batch(x_.size(0)),
        rows(mean_.size(0)),
        samples(batch > 0 ? rows / batch : 1),
        scalar(scale_ && scale_->dim() == 0),
        event(event_of(x_)),
        x(operand(x_)),
        param(static_cast<Param>(param_)),
        clamp{lo, hi} {
    size = event.numel();
    pieces = std::max<int64_t>(1, (size + kPiece - 1) / kPiece);
    split(mean_, scale_, mean, scale);
    if (scalar) {
      const T raw = scalar_value<T>(*scale_);
      shared = clamp.of(raw);
      shared_slope = clamp.outside(raw) ? T(0) : T(1);
    }
    if (mask_) mask = operand(*mask_);
  }

  void gradients(const Tensor& g_mean_, const OptionalTensor& g_scale_) {
    split(g_mean_, g_scale_, g_mean, g_scale);
  }

  // Call once all operands are known.
  void fuse() {
    event.fuse<7>({&mean, &x, &scale, &mask, &g_x, &g_mean, &g_scale}, /*reorder=*/true);
  }

  // Runs the pass. weight(n) is row n's upstream gradient; value and g_shared receive the rows'
  // −log p(x|z) and their shares of a scalar scale's gradient.
  template <class Weight>
  void run(bool gradient, const Weight& weight, T* value, T* g_shared) const {
    const LikelihoodPiece<T> kernel = likelihood_kernel<T>(param, scalar, gradient);
    // With a gradient for x, the samples that share a row of x belong to one unit of work.
    const int64_t first_rows = need_x ? batch : rows;
    std::vector<T> piece_values(pieces > 1 && value ? rows * pieces : 0);
    std::vector<T> piece_scales(pieces > 1 && g_shared ? rows * pieces : 0);
    T* const values = pieces > 1 && value ? piece_values.data() : value;
    T* const scales = pieces > 1 && g_shared ? piece_scales.data() : g_shared;
    const int64_t work = std::max<int64_t>(1, std::min(size, kPiece)) * (need_x ? samples : 1);
    torch::stable::parallel_for(
        0, first_rows * pieces, std::max<int64_t>(1, kGrain / work),
        [&](int64_t first, int64_t last) {
          std::vector<T> x_sum(need_x ? std::min(size, kPiece) : 0);
          for (int64_t unit = first; unit < last; ++unit) {
            const int64_t piece = unit % pieces, begin = piece * kPiece;
            const int64_t end = std::min(size, begin + kPiece);
            std::fill(x_sum.begin(), x_sum.end(), T(0));
            for (int64_t n = unit / pieces; n < rows; n += first_rows) {
              const LikelihoodTerms<T> terms =
                  run_piece(kernel, gradient, n, begin, end, weight(n), x_sum.data());
              if (values) values[n * pieces + piece] = terms.value;
              if (scales) {
                // Selected, not multiplied, since the gradient outside the clamp may be infinite.
                scales[n * pieces + piece] = shared_slope == T(0) ? T(0) : terms.g_scale;
              }
            }
            if (need_x) {
              event.store(g_x, unit / pieces, begin, end - begin,
                          static_cast<const T*>(x_sum.data()));
            }
          }
        });
    if (pieces == 1) return;
    for (int64_t n = 0; n < rows; ++n) {
      const auto total = [&](const T* part) {
        return tree_sum<T>(n * pieces, (n + 1) * pieces, [&](int64_t i) { return part[i]; });
      };
      if (value) value[n] = total(values);
      if (g_shared) g_shared[n] = total(scales);
    }
  }

 private:
  // The mean's and the scale's operands: two tensors, or the halves of a packed dimension 1.
  void split(const Tensor& mean_, const OptionalTensor& scale_, Operand& m, Operand& s) const {
    m = operand(mean_);
    if (!scale_) {
      s = m;
      s.data = s.at(mean_.size(1) / 2 * mean_.stride(1));
    } else if (!scalar) {
      s = operand(*scale_);
    }
  }

  // One piece of one row, tile by tile, with the constant of the elements it counts.
  LikelihoodTerms<T> run_piece(LikelihoodPiece<T> kernel, bool gradient, int64_t n,
                               int64_t begin, int64_t end, T weight, T* x_sum) const {
    T x_tile[kTile], m_tile[kTile], s_tile[kTile], gm_tile[kTile], gs_tile[kTile];
    bool zero[kTile];
    const int64_t b = samples == 1 ? n : n % batch;
    LikelihoodTerms<T> sum{T(0), T(0)};
    int64_t counted = 0;
    for (; begin < end; begin += kTile, x_sum += kTile) {
      const int64_t count = std::min(end - begin, kTile);
      const T* xs = event.load(x, b, begin, count, x_tile);
      const T* ms = event.load(mean, n, begin, count, m_tile);
      const T* ss = scalar ? &shared : event.load(scale, n, begin, count, s_tile);
      const bool clamped = !scalar && clamp.active();
      if (clamped) ss = clamp.apply(ss, count, s_tile, zero);
      LikelihoodTerms<T> terms;
      if (mask) {
        terms = masked_tile(kernel, gradient, n, b, begin, count, xs, ms, ss, weight, x_sum,
                            clamped ? zero : nullptr, counted);
      } else {
        T* gm = gradient ? event.target(g_mean, n, begin, gm_tile) : nullptr;
        T* gs = gradient && !scalar ? event.target(g_scale, n, begin, gs_tile) : nullptr;
        terms = kernel(count, xs, ms, ss, weight, gm, gs);
        if (gs && clamped) zero_where(zero, count, gs);
        if (gradient) store_gradients(n, begin, count, gm, gs, x_sum);
        counted += count;
      }
      sum.value += terms.value;
      sum.g_scale += terms.g_scale;
    }
    sum.value += static_cast<T>(kHalfLog2Pi) * static_cast<T>(counted);
    return sum;
  }

  // The selected elements are packed together, and only they are ever computed on.
  LikelihoodTerms<T> masked_tile(LikelihoodPiece<T> kernel, bool gradient, int64_t n, int64_t b,
                                 int64_t begin, int64_t count, const T* xs, const T* ms,
                                 const T* ss, T weight, T* x_sum, const bool* zero,
                                 int64_t& counted) const {
    T x_kept[kTile], m_kept[kTile], s_kept[kTile], gm_kept[kTile], gs_kept[kTile];
    int64_t index[kTile + 1], kept = 0;
    event.runs(mask, b, begin, count, [&](int64_t offset, int64_t stride, int64_t at, int64_t run) {
      const char* keep = mask.at(offset);
      for (int64_t i = 0; i < run; ++i) {
        index[kept] = at + i;
        kept += keep[i * stride] != 0;
      }
    });
    s_kept[0] = *ss;
    for (int64_t i = 0; i < kept; ++i) {
      x_kept[i] = xs[index[i]];
      m_kept[i] = ms[index[i]];
      if (!scalar) s_kept[i] = ss[index[i]];
    }
    counted += kept;
    const LikelihoodTerms<T> terms =
        kernel(kept, x_kept, m_kept, s_kept, weight, gm_kept, gs_kept);
    if (gradient) {
      T gm_tile[kTile] = {}, gs_tile[kTile] = {};
      for (int64_t i = 0; i < kept; ++i) {
        gm_tile[index[i]] = gm_kept[i];
        if (!scalar) gs_tile[index[i]] = gs_kept[i];
      }
      if (zero) zero_where(zero, count, gs_tile);
      store_gradients(n, begin, count, gm_tile, gs_tile, x_sum);
    }
    return terms;
  }

  void store_gradients(int64_t n, int64_t begin, int64_t count, const T* gm, const T* gs,
                       T* x_sum) const {
    if (need_x) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x_sum[i] -= gm[i];  // ∂x = −∂m
    }
    event.store(g_mean, n, begin, count, gm);
    if (!scalar) event.store(g_scale, n, begin, count, gs);
  }
};

// The loss of rows t = nll + β(log q − log p): the mean over samples, then the reduction.
template <class T>
Tensor finish_loss(const Likelihood<T>& pass, const T* nll, const OptionalTensor& log_q,
                   const OptionalTensor& log_p, double beta, Reduction reduction) {
  if (reduction == Reduction::no_loss) return none(type_of<T>);
  const OptionalTensor flat_q = flat(log_q), flat_p = flat(log_p);
  const RowValues<T> q(flat_q), p(flat_p);
  const T b = static_cast<T>(beta);
  const auto term = [&](int64_t n) { return log_q ? nll[n] + b * (q[n] - p[n]) : nll[n]; };
  if (reduction == Reduction::none) {
    Tensor loss = empty(Dims(pass.batch), type_of<T>);
    T* const out = data_of<T>(loss);
    for (int64_t i = 0; i < pass.batch; ++i) {
      const auto sample = [&](int64_t k) { return term(k * pass.batch + i); };
      out[i] = tree_sum<T>(0, pass.samples, sample) / static_cast<T>(pass.samples);
    }
    return loss;
  }
  Tensor loss = empty(Dims(), type_of<T>);
  const T count = static_cast<T>(reduction == Reduction::mean ? pass.rows : pass.samples);
  *data_of<T>(loss) = tree_sum<T>(0, pass.rows, term) / count;
  return loss;
}

// The latent terms' gradients: ±β times the row's share of the loss gradient.
template <class T>
std::tuple<Tensor, Tensor> latent_gradients(int64_t rows, int64_t batch, double beta, T share,
                                            const RowValues<T>& g_loss) {
  Tensor g_log_q = empty(Dims(rows), type_of<T>), g_log_p = empty(Dims(rows), type_of<T>);
  T* const q = data_of<T>(g_log_q);
  T* const p = data_of<T>(g_log_p);
  for (int64_t n = 0; n < rows; ++n) {
    q[n] = static_cast<T>(beta) * share * g_loss[n % batch];
    p[n] = -q[n];
  }
  return {g_log_q, g_log_p};
}

template <class T>
std::tuple<Tensor, Tensor> likelihood_forward_as(const Tensor& x, const Tensor& mean,
                                                 const OptionalTensor& scale,
                                                 const OptionalTensor& mask,
                                                 const OptionalTensor& log_q,
                                                 const OptionalTensor& log_p, double beta,
                                                 int64_t reduction, int64_t param, double lo,
                                                 double hi) {
  Likelihood<T> pass(x, mean, scale, mask, param, lo, hi);
  pass.fuse();
  Tensor nll = empty(Dims(pass.rows), type_of<T>);
  T* const value = data_of<T>(nll);
  pass.run(/*gradient=*/false, [](int64_t) { return T(0); }, value, nullptr);
  return {nll, finish_loss<T>(pass, value, log_q, log_p, beta, static_cast<Reduction>(reduction))};
}

std::tuple<Tensor, Tensor> likelihood_forward(Tensor x, Tensor mean, OptionalTensor scale,
                                              OptionalTensor mask, OptionalTensor log_q,
                                              OptionalTensor log_p, double beta, int64_t reduction,
                                              int64_t param, double lo, double hi) {
  const auto run = is_double(mean) ? likelihood_forward_as<double> : likelihood_forward_as<float>;
  return run(x, mean, scale, mask, log_q, log_p, beta, reduction, param, lo, hi);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> likelihood_backward_as(
    const OptionalTensor& g_nll, const OptionalTensor& g_loss, const Tensor& x, const Tensor& mean,
    const OptionalTensor& scale, const OptionalTensor& mask, double beta, int64_t reduction,
    int64_t param, double lo, double hi, bool need_x) {
  Likelihood<T> pass(x, mean, scale, mask, param, lo, hi);
  const bool full = scale && !pass.scalar;
  Tensor g_mean = gradient_like(mean);
  Tensor g_scale = full ? gradient_like(*scale) : none(mean.scalar_type());
  Tensor g_x = need_x ? gradient_like(x) : none(x.scalar_type());
  pass.gradients(g_mean, full ? OptionalTensor(g_scale) : scale);
  pass.need_x = need_x;
  if (need_x) pass.g_x = operand(g_x);
  pass.fuse();

  const RowValues<T> nll(g_nll), loss(g_loss);
  const T share = row_share<T>(pass.rows, pass.samples, static_cast<Reduction>(reduction));
  const auto weight = [&](int64_t n) { return nll[n] + share * loss[n % pass.batch]; };
  std::vector<T> g_shared(pass.scalar ? pass.rows : 0);
  pass.run(/*gradient=*/true, weight, nullptr, pass.scalar ? g_shared.data() : nullptr);
  if (pass.scalar) {
    g_scale = scalar_tensor(tree_sum<T>(0, pass.rows, [&](int64_t n) { return g_shared[n]; }),
                            scale->scalar_type());
  }
  auto [g_log_q, g_log_p] = latent_gradients<T>(pass.rows, pass.batch, beta, share, loss);
  return {g_x, g_mean, g_scale, g_log_q, g_log_p};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> likelihood_backward(
    OptionalTensor g_nll, OptionalTensor g_loss, Tensor x, Tensor mean, OptionalTensor scale,
    OptionalTensor mask, double beta, int64_t reduction, int64_t param, double lo, double hi,
    bool need_x) {
  const auto run = is_double(mean) ? likelihood_backward_as<double> : likelihood_backward_as<float>;
  return run(g_nll, g_loss, x, mean, scale, mask, beta, reduction, param, lo, hi, need_x);
}

// The forward that also writes the gradients, into g_mean and g_scale, which may be mean and scale.
template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_grad_as(
    const Tensor& x, const Tensor& mean, const OptionalTensor& scale, const OptionalTensor& mask,
    const OptionalTensor& log_q, const OptionalTensor& log_p, double beta, int64_t reduction_code,
    int64_t param, double lo, double hi, const Tensor& g_mean, const OptionalTensor& g_scale) {
  const auto reduction = static_cast<Reduction>(reduction_code);
  Likelihood<T> pass(x, mean, scale, mask, param, lo, hi);
  pass.gradients(g_mean, pass.scalar ? scale : g_scale);
  pass.fuse();
  Tensor nll = empty(Dims(pass.rows), type_of<T>);
  Tensor g_shared = pass.scalar ? empty(Dims(pass.rows), type_of<T>) : none(type_of<T>);
  const T share = row_share<T>(pass.rows, pass.samples, reduction);
  pass.run(/*gradient=*/true, [&](int64_t) { return share; }, data_of<T>(nll),
           pass.scalar ? data_of<T>(g_shared) : nullptr);
  return {nll, finish_loss<T>(pass, data_of<T>(nll), log_q, log_p, beta, reduction), g_shared};
}

std::tuple<Tensor, Tensor, Tensor> likelihood_forward_grad(
    Tensor x, Tensor mean, OptionalTensor scale, OptionalTensor mask, OptionalTensor log_q,
    OptionalTensor log_p, double beta, int64_t reduction, int64_t param, double lo, double hi,
    Tensor g_mean, OptionalTensor g_scale) {
  const auto run = is_double(mean) ? forward_grad_as<double> : forward_grad_as<float>;
  return run(x, mean, scale, mask, log_q, log_p, beta, reduction, param, lo, hi, g_mean, g_scale);
}

// grad[n] *= factor(n), rows in parallel.
template <class T, class Factor>
void rescale_rows(const Tensor& grad, const Factor& factor) {
  Operand rows = operand(grad);
  Event event = event_of(grad);
  event.fuse<1>({&rows}, /*reorder=*/true);
  const int64_t size = event.numel();
  torch::stable::parallel_for(
      0, grad.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)),
      [&](int64_t first, int64_t last) {
        T tile[kTile], scaled[kTile];
        for (int64_t n = first; n < last; ++n) {
          for (int64_t begin = 0; begin < size; begin += kTile) {
            const int64_t count = std::min(size - begin, kTile);
            const T* from = event.load(rows, n, begin, count, tile);
            const T by = factor(n);
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) scaled[i] = from[i] * by;
            event.store(rows, n, begin, count, static_cast<const T*>(scaled));
          }
        }
      });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> likelihood_rescale_as(
    const Tensor& g_mean, const OptionalTensor& g_scale, const OptionalTensor& g_shared,
    const OptionalTensor& g_nll, const OptionalTensor& g_loss, double beta, int64_t reduction,
    int64_t samples, int64_t batch) {
  const RowValues<T> nll(g_nll), loss(g_loss);
  const int64_t rows = samples * batch;
  const T share = row_share<T>(rows, samples, static_cast<Reduction>(reduction));
  const auto factor = [&](int64_t n) { return loss[n % batch] + nll[n] / share; };
  const bool unit = rows == 0 || (!g_nll && loss.stride == 0 && factor(0) == T(1));
  if (!unit) {
    rescale_rows<T>(g_mean, factor);
    if (g_scale) rescale_rows<T>(*g_scale, factor);
  }
  Tensor total = none(type_of<T>);
  if (g_shared) {
    const RowValues<T> part(g_shared);
    const auto term = [&](int64_t n) { return factor(n) * part[n]; };
    total = scalar_tensor(tree_sum<T>(0, rows, term), type_of<T>);
  }
  auto [g_log_q, g_log_p] = latent_gradients<T>(rows, batch, beta, share, loss);
  return {g_log_q, g_log_p, total};
}

std::tuple<Tensor, Tensor, Tensor> likelihood_rescale_(Tensor g_mean, OptionalTensor g_scale,
                                                       OptionalTensor g_shared,
                                                       OptionalTensor g_nll, OptionalTensor g_loss,
                                                       double beta, int64_t reduction,
                                                       int64_t samples, int64_t batch) {
  const auto run = is_double(g_mean) ? likelihood_rescale_as<double> : likelihood_rescale_as<float>;
  return run(g_mean, g_scale, g_shared, g_nll, g_loss, beta, reduction, samples, batch);
}

}  // namespace
}  // namespace vae_fast

STABLE_TORCH_LIBRARY_IMPL(vae_fast, CPU, m) {
  m.impl("latent_forward", TORCH_BOX(&vae_fast::latent_forward));
  m.impl("latent_backward", TORCH_BOX(&vae_fast::latent_backward));
  m.impl("likelihood_forward", TORCH_BOX(&vae_fast::likelihood_forward));
  m.impl("likelihood_backward", TORCH_BOX(&vae_fast::likelihood_backward));
  m.impl("likelihood_forward_grad", TORCH_BOX(&vae_fast::likelihood_forward_grad));
  m.impl("likelihood_rescale_", TORCH_BOX(&vae_fast::likelihood_rescale_));
}
