// The likelihood pass of passes.h: the loops of likelihood.h over tiles of the operands.
//
// Outputs of the backward passes are written whole, whatever was in them.

#define VAE_FAST_KERNELS "likelihood.h"
#include "each_isa.h"
#include "operand.h"
#include "parallel.h"
#include "passes.h"

#include <memory>
#include <vector>

namespace vae_fast {
namespace {

template <class T>
LikelihoodKernel<T> likelihood_kernel(Family family, Param param, LikelihoodVariant variant);
template <>
LikelihoodKernel<double> likelihood_kernel(Family family, Param param, LikelihoodVariant variant) {
  return base::likelihood_kernel<double>(family, param, variant);
}
template <>
LikelihoodKernel<float> likelihood_kernel(Family family, Param param, LikelihoodVariant variant) {
  VAE_FAST_SELECT(likelihood_kernel, family, param, variant)
}

// That of rows which are read and written as they are stored; null if there is none.
template <class T, class As>
LikelihoodKernel<T, typename As::S, typename As::X> stored_kernel(As as, Family family, Param param,
                                                                  LikelihoodVariant variant) {
  if constexpr (std::is_same_v<T, float>) {
    if (family == Family::gaussian && !variant.masked) return gaussian_kernel(as, param, variant);
  }
  return nullptr;
}

// ∂loss/∂(row's term), for an upstream gradient of one.
template <class T>
T row_share(int64_t rows, int64_t samples, Reduction reduction) {
  if (reduction == Reduction::no_loss) return T(0);
  return T(1) / static_cast<T>(reduction == Reduction::mean ? std::max<int64_t>(rows, 1) : samples);
}

// Bytes of a large operand: with five of this size the pass overflows a last cache of 32 MiB.
// Gradients go past the caches then. Smaller ones stay there for whoever reads them next.
constexpr int64_t kLarge = int64_t(6) << 20;
constexpr int64_t kVector = 64;  // bytes of the widest vector

// What one value of the scale serves.
enum class Sharing { none, all, row, event };

// The operands of one likelihood op and the loop over them.
template <class T>
struct Likelihood {
  int64_t batch, rows, samples, size, pieces;
  Sharing sharing = Sharing::none;
  bool scalar, need_x = false;  // scalar: one value of the scale for a row, if any
  Event event;
  Operand x, mean, scale, mask, g_x, g_mean, g_scale, g_event;  // g_event: of a scale of the event
  T shared = T(0), shared_slope = T(1);  // the one scale of all rows, prepared; and its derivative
  std::vector<T> row_scale, row_slope;   // or one for each
  EventScale<T> event_scale{};           // or those of the event, with their slopes, in one buffer
  const T* event_slope = nullptr;
  std::unique_ptr<T[]> event_buffer;
  Family family;
  Param param;
  bool packed;  // the scale is the second half of the mean's tensor
  Model<T> model;
  Clamp clamp;
  bool prepared;  // whether an element's scale is not read raw, but with soft bounds or as log σ
  bool as_log;    // the latter
  LikelihoodOptions options;
  TileKernels<T> tiles;

  Likelihood(const View& x_, const View& mean_, const View& scale_, const View& mask_,
             const LikelihoodOptions& options_)
      : batch(x_.sizes[0]),
        rows(mean_.sizes[0]),
        samples(batch > 0 ? rows / batch : 1),
        event(event_of(x_)),
        x(operand(x_)),
        family(static_cast<Family>(options_.likelihood)),
        param(static_cast<Param>(options_.param)),
        packed(!scale_ && has_scale(family)),
        model(family, options_.df, options_.x_mul, options_.x_add),
        clamp{options_.lo, options_.hi, options_.soft},
        prepared((clamp.active() && clamp.soft) ||
                 (family != Family::gaussian && !is_exponential(param))),
        as_log(prepared && family != Family::gaussian),
        options(options_),
        tiles(tile_kernels<T>(param)) {
    size = event.numel();
    pieces = std::max<int64_t>(1, (size + kPiece - 1) / kPiece);
    sharing = sharing_of(scale_, mean_);
    scalar = sharing == Sharing::all || sharing == Sharing::row || !has_scale(family);
    split(mean_, scale_, mean, scale);
    if (sharing == Sharing::all || sharing == Sharing::row) load_row_scales(scale_);
    if (mask_) mask = operand(mask_);
    if (!prepared) {
      model.lo = static_cast<T>(clamp.lo);
      model.hi = static_cast<T>(clamp.hi);
    }
  }

  // What is absent is not wanted; of a packed mean there are both or none.
  void gradients(const View& g_mean_, const View& g_scale_) {
    if (g_mean_) split(g_mean_, g_scale_, g_mean, g_scale);
    if (!packed) g_scale = Operand{};
    if (g_scale_ && !scalar) (sharing == Sharing::event ? g_event : g_scale) = operand(g_scale_);
  }

  // Call once all operands are known. The order of the elements is that of the noise, if there is some.
  void fuse() {
    event.fuse<8>({&mean, &x, &scale, &mask, &g_x, &g_mean, &g_scale, &g_event},
                  /*reorder=*/!options.key);
    if (sharing == Sharing::event) load_event_scales();
  }

  // Runs the pass. weight holds the rows' upstream gradients; value and g_shared receive the rows'
  // −log p(x|z) and their shares of a scalar scale's gradient.
  void run(bool gradient, Rows<const T> weight, T* value, T* g_shared) const {
    // Bounds may be infinite: a masked kernel always has some, and one that leaves out g_scale.
    const bool of_event = sharing == Sharing::event;
    const bool bounded = mask || (clamp.active() && !prepared) || (gradient && !g_scale);
    const ScaleKind kind = scalar     ? ScaleKind::row
                           : of_event ? ScaleKind::event
                           : bounded  ? ScaleKind::bounded
                                      : ScaleKind::each;
    const LikelihoodVariant variant{kind, static_cast<bool>(mask), gradient};
    const Param read_as = of_event || as_log ? Param::logstd : param;
    const LikelihoodKernel<T> kernel = likelihood_kernel<T>(family, read_as, variant);
    // With a gradient for x, the samples that share a row of x belong to one unit of work; with one
    // for a shared event, a block of rows.
    const int64_t first_rows = need_x ? batch : rows;
    const int64_t block = g_event ? std::max<int64_t>(kEventRows, (first_rows + 63) / 64) : 1;
    const int64_t blocks = (first_rows + block - 1) / block;
    std::vector<LikelihoodTerms<T>> terms(rows * pieces);
    std::vector<Line> event_sums(g_event ? blocks * lines() : 0);
    const int64_t work =
        std::min(size, kPiece) * (need_x ? std::max<int64_t>(1, samples) : 1) * block;
    const auto as_stored = [&](auto as) -> decltype(stored_kernel<T>(as, family, param, variant)) {
      using As = decltype(as);
      const bool reads = reads_in_place<typename As::S, typename As::X>(gradient);
      return reads ? stored_kernel<T>(as, family, read_as, variant) : nullptr;
    };
    const auto bf16 = as_stored(Stored<Bf16>{});
    const auto bf16_floats = as_stored(Stored<Bf16, T>{});
    const auto levels = as_stored(Stored<T, uint8_t>{});
    const auto bf16_levels = as_stored(Stored<Bf16, uint8_t>{});
    const bool half = bf16 || bf16_floats || bf16_levels;
    const bool direct = half || levels || reads_in_place<T, T>(gradient);
    const bool stream = gradient && (half ? streams<Bf16>() : streams<T>());
    const auto in_place = [&](int64_t first, int64_t last, int64_t begin, int64_t end, T* sums,
                              LikelihoodTerms<T>* to) {
      const auto run_all = [&](auto chosen) {
        run_rows(chosen, gradient, first, last, begin, end, weight, stream, sums, to);
      };
      if (bf16) return run_all(bf16);
      if (bf16_floats) return run_all(bf16_floats);
      if (levels) return run_all(levels);
      if (bf16_levels) return run_all(bf16_levels);
      run_all(kernel);
    };
    const auto run_units = [&](int64_t first, int64_t last) {
      if (direct && pieces == 1 && !g_event) {
        in_place(first, last, 0, size, nullptr, terms.data() + first);
        return;
      }
      std::vector<T> x_sum(need_x ? std::min(size, kPiece) : 0);
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t piece = unit % pieces, begin = piece * kPiece;
        const int64_t first_row = unit / pieces * block;
        const int64_t last_row = std::min(first_rows, first_row + block);
        const int64_t end = std::min(size, begin + kPiece);
        T* const sums = g_event ? event_sums[unit / pieces * lines()].values + begin : nullptr;
        if (direct && pieces == 1) {
          in_place(first_row, last_row, begin, end, sums, &terms[first_row]);
          continue;
        }
        for (int64_t row = first_row; row < last_row; ++row) {
          if (direct) {
            in_place(row, row + 1, begin, end, sums, &terms[row * pieces + piece]);
            continue;
          }
          std::fill(x_sum.begin(), x_sum.end(), T(0));
          for (int64_t n = row; n < rows; n += first_rows) {
            run_piece(kernel, gradient, stream, n, begin, end, weight[n], x_sum.data(), sums,
                      &terms[n * pieces + piece]);
          }
          if (need_x) {
            event.store(g_x, row, begin, end - begin, static_cast<const T*>(x_sum.data()));
          }
        }
      }
    };
    parallel_parts(blocks * pieces, work, [&](const auto& parts) {
      parts(run_units);
      if (stream) finish_stream();  // a wait: not after every tile
    });
    for (int64_t n = 0; n < rows; ++n) {
      const auto total = [&](T LikelihoodTerms<T>::*part) {
        const auto term = [&](int64_t i) { return terms[i].*part; };
        return pieces == 1 ? term(n) : tree_sum<T>(n * pieces, (n + 1) * pieces, term);
      };
      if (value) value[n] = total(&LikelihoodTerms<T>::value);
      if (g_shared) {
        g_shared[n] = total(&LikelihoodTerms<T>::g_scale);
        scale_by(sharing == Sharing::row ? &row_slope[n] : &shared_slope, 1, &g_shared[n]);
      }
    }
    if (g_event) store_event(event_sums, blocks);
  }

 private:
  static constexpr int64_t kEventRows = 32;  // rows that share one partial sum of an event, or more

  // Partial sums begin where vectors are aligned: what the next row adds to is still on its way to
  // memory, and is read from there only if it does not cross a line.
  struct alignas(kVector) Line {
    T values[kVector / sizeof(T)] = {};
  };
  int64_t lines() const { return size * sizeof(T) / kVector + 1; }

  static Sharing sharing_of(const View& scale_, const View& mean_) {
    if (!scale_) return Sharing::none;
    if (scale_.dim == 0) return Sharing::all;
    if (std::equal(scale_.sizes, scale_.sizes + scale_.dim, mean_.sizes)) return Sharing::none;
    return scale_.sizes[0] == mean_.sizes[0] ? Sharing::row : Sharing::event;
  }

  // The mean's and the scale's operands: two tensors, or the halves of a packed dimension 1.
  void split(const View& mean_, const View& scale_, Operand& m, Operand& s) const {
    m = operand(mean_);
    if (scalar) return;
    if (scale_) {
      s = operand(scale_);
      if (sharing == Sharing::event) s.row_stride = 0;
    } else if (packed) {
      s = m;
      s.data = s.at(mean_.sizes[1] / 2 * mean_.strides[1]);
    }
  }

  void load_row_scales(const View& scale_) {
    const bool each = sharing == Sharing::row;
    if (each) {
      row_scale.resize(rows);
      row_slope.assign(rows, T(1));
    }
    const int64_t count = each ? rows : 1;
    T* const to = each ? row_scale.data() : &shared;
    T* const slope = each ? row_slope.data() : &shared_slope;
    const Operand o = operand(scale_, each ? 1 : 0);
    gather(o, run_of(0, o.row_stride, count), to);
    if (prepared || clamp.active()) {
      tiles.prepare_scale(count, clamp, as_log, to, to, slope);
    }
  }
  void load_event_scales() {
    event_buffer.reset(new T[3 * size]);
    T *const log_sigma = event_buffer.get(), *const root = log_sigma + size,
             *const slope = root + size;
    parallel_parts((size + kTile - 1) / kTile, kTile, [&](const auto& parts) {
      alignas(64) T tile[kTile];
      parts([&](int64_t first, int64_t last) {
        for (int64_t begin = first * kTile; begin < std::min(last * kTile, size); begin += kTile) {
          const int64_t count = std::min(size - begin, kTile);
          tiles.resolve_scale(count, clamp, event.load(scale, 0, begin, count, tile),
                              log_sigma + begin, slope + begin, root + begin);
        }
      });
    });
    event_scale = {log_sigma, root, nullptr};
    event_slope = slope;
    scale = Operand{};
  }
  // The event's from an element on, if it has some.
  EventScale<T> event_scales(int64_t begin, T* sums) const {
    if (sharing != Sharing::event) return {};
    return {event_scale.log_sigma + begin, event_scale.root + begin, sums};
  }
  // Of no meaning where each element has its own.
  Rows<const T> row_scales(int64_t n) const {
    return sharing == Sharing::row ? Rows<const T>{&row_scale[n], 1} : Rows<const T>{&shared, 0};
  }

  // Whether a kernel of elements stored as S, and data as X, can read and write the operands' own
  // memory, row by row.
  template <class S, class X>
  bool reads_in_place(bool gradient) const {
    const auto fits = [&](const Operand& o) { return event.template direct<S>(o); };
    const auto writes = [&](const Operand& g) { return !gradient || (g && fits(g)); };
    return !need_x && !options.key && masks_in_place() && event.template direct<X>(x) &&
           fits(mean) && writes(g_mean) &&
           (!scale || (!prepared && fits(scale) && (!g_scale || writes(g_scale))));
  }

  bool masks_in_place() const {
    return !mask || (mask.straight && (mask.strides.back() == 1 || size == 1));
  }

  // Whether the gradients go past the caches: if they are larger, aligned, and not written in place.
  template <class S>
  bool streams() const {
    const auto suits = [&](const Operand& g, const Operand& of) {
      return !g || (event.template direct<S>(g) && g.data != of.data &&
                    reinterpret_cast<uintptr_t>(g.data) % kVector == 0 &&
                    g.row_stride * sizeof(S) % kVector == 0);
    };
    const bool large = rows * size * static_cast<int64_t>(sizeof(S)) >= kLarge;
    return large && suits(g_mean, mean) && suits(g_scale, scale);
  }

  // Rows [first, last) of a batch and its samples, or a piece of each, in place.
  template <class S, class X>
  void run_rows(LikelihoodKernel<T, S, X> kernel, bool gradient, int64_t first, int64_t last,
                int64_t begin, int64_t end, Rows<const T> weight, bool past_caches, T* sums,
                LikelihoodTerms<T>* terms) const {
    const auto at = [&](const Operand& o, int64_t row) {
      return reinterpret_cast<S*>(o.at(row * o.row_stride + begin));
    };
    const auto in = [&](const Operand& o, int64_t row) {
      return o ? Rows<const S>{at(o, row), o.row_stride} : Rows<const S>{};
    };
    const auto out = [&](const Operand& o, int64_t row) {
      return o && gradient ? Rows<S>{at(o, row), o.row_stride} : Rows<S>{};
    };
    for (int64_t n = first; n < last;) {
      const int64_t b = n % batch, count = std::min(last - n, batch - b);  // of one sample
      const Rows<const uint8_t> kept{mask ? mask_at(b, begin) : nullptr, mask.row_stride};
      const auto* const xs = reinterpret_cast<const X*>(x.at(b * x.row_stride + begin));
      kernel(count, end - begin, model, {xs, x.row_stride}, in(mean, n), in(scale, n),
             row_scales(n), event_scales(begin, sums), kept, {weight[n], weight.pitch},
             out(g_mean, n), out(g_scale, n), past_caches, terms);
      n += count;
      terms += count;
    }
  }

  // Data as T: floats as they are, levels with their scale and their noise.
  const T* load_x(int64_t b, int64_t begin, int64_t n, T* buffer) const {
    if (x.type != ScalarType::Byte) return event.load(x, b, begin, n, buffer);
    alignas(64) float u[kTile + 64];  // room for the last block of 16 Philox calls
    if (options.key) {
      constexpr int64_t kLanes = 4;
      const uint64_t* const key = data_of<uint64_t>(options.key);
      const uint64_t seed = key[0], offset = key[options.key.strides[0]];
      const uint64_t calls = (size + kLanes - 1) / kLanes, row = uint64_t(options.first_row) + b;
      kStorage.uniform((n + kLanes - 1) / kLanes, offset + row * calls + begin / kLanes,
                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), u);
    }
    event.blocks(x, b, begin, n, [&](const Block& block, int64_t first) {
      uint8_t bytes[kTile];
      tiles.levels(block.rows * block.count, gather_bytes(x, block, bytes),
                   options.key ? u + first : nullptr, static_cast<T>(options.x_mul),
                   static_cast<T>(options.x_add), buffer + first);
    });
    return buffer;
  }

  const uint8_t* mask_at(int64_t b, int64_t begin) const {
    return reinterpret_cast<const uint8_t*>(mask.at(b * mask.row_stride + begin));
  }
  const uint8_t* load_mask(int64_t b, int64_t begin, int64_t n, uint8_t* buffer) const {
    if (masks_in_place()) return mask_at(b, begin);
    event.blocks(mask, b, begin, n, [&](const Block& block, int64_t first) {
      const uint8_t* const from = gather_bytes(mask, block, buffer + first);
      if (from != buffer + first) std::memcpy(buffer + first, from, block.count);
    });
    return buffer;
  }

  // One piece of one row, tile by tile.
  void run_piece(LikelihoodKernel<T> kernel, bool gradient, bool stream, int64_t n, int64_t begin,
                 int64_t end, const T* weight, T* x_sum, T* sums,
                 LikelihoodTerms<T>* terms) const {
    alignas(64) T x_tile[kTile], m_tile[kTile], s_tile[kTile];
    alignas(64) T gm_tile[kTile], gs_tile[kTile], slope[kTile];
    uint8_t kept[kTile];
    const int64_t b = samples == 1 ? n : n % batch;
    for (; begin < end; begin += kTile) {
      const int64_t count = std::min(end - begin, kTile);
      Tile tile;
      tile.x = load_x(b, begin, count, x_tile);
      tile.mean = event.load(mean, n, begin, count, m_tile);
      tile.scale = scale ? event.load(scale, n, begin, count, s_tile) : nullptr;
      tile.slope = scale && prepared ? slope : nullptr;
      tile.mask = mask ? load_mask(b, begin, count, kept) : nullptr;
      if (tile.slope) {
        tiles.prepare_scale(count, clamp, as_log, tile.scale, s_tile, slope);
        tile.scale = s_tile;
      }
      // Straight past the caches only what nobody has to change any more.
      const bool past = stream && !tile.slope && !need_x;
      const bool buffered = !gradient || (stream && !past);
      T* const gm = buffered || !g_mean ? gm_tile : event.target(g_mean, n, begin, gm_tile);
      T* const gs = !g_scale   ? nullptr
                    : buffered ? gs_tile
                               : event.target(g_scale, n, begin, gs_tile);
      kernel(1, count, model, {tile.x, 0}, {tile.mean, 0}, {tile.scale, 0}, row_scales(n),
             event_scales(begin, sums), {tile.mask, 0}, {weight, 0}, {gm, 0}, {gs, 0}, past, terms);
      if (gradient && !past) store_gradients(stream, n, begin, count, tile, weight, gm, gs, x_sum);
      if (x_sum) x_sum += kTile;
      if (sums) sums += kTile;
    }
  }

  // A tile of the operands; slope is the prepared scale's derivative, or null, as is no mask.
  struct Tile {
    const T *x, *mean, *scale, *slope;
    const uint8_t* mask;
  };

  void store_gradients(bool stream, int64_t n, int64_t begin, int64_t count, const Tile& tile,
                       const T* weight, const T* gm, T* gs, T* x_sum) const {
    if (need_x && family == Family::bernoulli) {
      for (int64_t i = 0; i < count; ++i) {
        if (!tile.mask || tile.mask[i]) x_sum[i] -= *weight * tile.mean[i];
      }
    } else if (need_x) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x_sum[i] -= gm[i];  // ∂x = −∂m
    }
    const auto put = [&](const Operand& to, const T* from, const T* slope) {
      if (!to) return;
      if (stream) {
        T* const at = reinterpret_cast<T*>(to.at(n * to.row_stride + begin));
        tiles.stream(count, from, slope, at);
      } else {
        event.store(to, n, begin, count, from);
      }
    };
    put(g_mean, gm, nullptr);
    if (!g_scale) return;
    if (tile.slope && !stream) scale_by(tile.slope, count, gs);
    put(g_scale, gs, tile.slope);
  }

  // The blocks' sums of a shared event, added up in order.
  void store_event(const std::vector<Line>& sums, int64_t blocks) const {
    parallel_parts((size + kTile - 1) / kTile, kTile * blocks, [&](const auto& parts) {
      T tile[kTile];
      parts([&](int64_t first, int64_t last) {
        for (int64_t begin = first * kTile; begin < std::min(last * kTile, size); begin += kTile) {
          const int64_t count = std::min(size - begin, kTile);
          std::fill(tile, tile + count, T(0));
          for (int64_t block = 0; block < blocks; ++block) {
            const T* const from = sums[block * lines()].values + begin;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) tile[i] += from[i];
          }
          scale_by(event_slope + begin, count, tile);
          event.store(g_event, 0, begin, count, static_cast<const T*>(tile));
        }
      });
    });
  }
};

// The loss of rows t = nll + β(log q − log p): the mean over samples, then the reduction.
template <class T>
void finish_loss(const Likelihood<T>& pass, const T* nll, const View& log_q, const View& log_p,
                 const LikelihoodOptions& options, const View& loss) {
  if (!loss) return;
  const RowValues<T> q(log_q, pass.batch), p(log_p, pass.batch);
  const T b = static_cast<T>(options.beta);
  const auto term = [&](int64_t n) { return log_q ? nll[n] + b * (q[n] - p[n]) : nll[n]; };
  T* const out = data_of<T>(loss);
  if (options.reduction == Reduction::none) {
    for (int64_t i = 0; i < pass.batch; ++i) {
      const auto sample = [&](int64_t k) { return term(k * pass.batch + i); };
      out[i] = tree_sum<T>(0, pass.samples, sample) / static_cast<T>(pass.samples);
    }
    return;
  }
  const bool mean = options.reduction == Reduction::mean;
  *out = tree_sum<T>(0, pass.rows, term) / static_cast<T>(mean ? pass.rows : pass.samples);
}

// The latent terms' gradients: ±β times the row's share of the loss gradient.
template <class T>
void latent_gradients(int64_t rows, double beta, T share, const RowValues<T>& g_loss,
                      const View& g_log_q, const View& g_log_p) {
  if (!g_log_q) return;
  T* const q = data_of<T>(g_log_q);
  T* const p = data_of<T>(g_log_p);
  for (int64_t n = 0, b = 0; n < rows; ++n, b = b + 1 == g_loss.batch ? 0 : b + 1) {
    q[n] = static_cast<T>(beta) * share * g_loss[b];
    p[n] = -q[n];
  }
}

template <class T>
void likelihood_forward_as(const View& x, const View& mean, const View& scale, const View& mask,
                           const View& log_q, const View& log_p, const LikelihoodOptions& options,
                           const View& nll, const View& loss) {
  Likelihood<T> pass(x, mean, scale, mask, options);
  pass.fuse();
  T* const value = data_of<T>(nll);
  pass.run(/*gradient=*/false, {}, value, nullptr);
  finish_loss<T>(pass, value, log_q, log_p, options, loss);
}

template <class T>
void likelihood_backward_as(const View& g_nll, const View& g_loss, const View& x, const View& mean,
                            const View& scale, const View& mask, const LikelihoodOptions& options,
                            const View& g_x, const View& g_mean, const View& g_scale,
                            const View& g_log_q, const View& g_log_p) {
  Likelihood<T> pass(x, mean, scale, mask, options);
  pass.gradients(g_mean, g_scale);
  pass.need_x = g_x.present;
  if (g_x) pass.g_x = operand(g_x);
  pass.fuse();

  const RowValues<T> nll(g_nll, pass.batch), loss(g_loss, pass.batch);
  const T share = row_share<T>(pass.rows, pass.samples, options.reduction);
  const bool shared = g_scale && (pass.sharing == Sharing::all || pass.sharing == Sharing::row);
  std::vector<T> weight(pass.rows), g_shared(shared ? pass.rows : 0);
  for (int64_t n = 0; n < pass.rows; ++n) weight[n] = nll[n] + share * loss[n % loss.batch];
  if (g_x || g_mean || g_scale) {
    pass.run(/*gradient=*/true, {weight.data(), 1}, nullptr, shared ? g_shared.data() : nullptr);
  }
  if (shared && pass.sharing == Sharing::all) {
    store_scalar(g_scale, tree_sum<T>(0, pass.rows, [&](int64_t n) { return g_shared[n]; }));
  } else if (shared) {
    const Operand to = operand(g_scale);
    scatter(to, run_of(0, to.row_stride, pass.rows), static_cast<const T*>(g_shared.data()));
  }
  latent_gradients<T>(pass.rows, options.beta, share, loss, g_log_q, g_log_p);
}

template <class T>
void forward_grad_as(const View& x, const View& mean, const View& scale, const View& mask,
                     const View& log_q, const View& log_p, const LikelihoodOptions& options,
                     const View& g_mean, const View& g_scale, const View& nll, const View& loss,
                     const View& g_shared) {
  Likelihood<T> pass(x, mean, scale, mask, options);
  pass.gradients(g_mean, g_scale);
  pass.fuse();
  const T share = row_share<T>(pass.rows, pass.samples, options.reduction);
  pass.run(/*gradient=*/true, {&share, 0}, data_of<T>(nll),
           g_shared ? data_of<T>(g_shared) : nullptr);
  finish_loss<T>(pass, data_of<T>(nll), log_q, log_p, options, loss);
}

// grad[n] *= factor(n), rows in parallel.
template <class T, class Factor>
void rescale_rows(const View& grad, const Factor& factor) {
  Operand rows = operand(grad);
  Event event = event_of(grad);
  event.fuse<1>({&rows}, /*reorder=*/true);
  const int64_t size = event.numel();
  parallel_parts(grad.sizes[0], size, [&](const auto& parts) {
    T tile[kTile];
    parts([&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        for (int64_t begin = 0; begin < size; begin += kTile) {
          const int64_t count = std::min(size - begin, kTile);
          const T* from = event.load(rows, n, begin, count, tile);
          T* const to = event.target(rows, n, begin, tile);  // the same place
          const T by = factor(n);
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) to[i] = from[i] * by;
          event.store(rows, n, begin, count, static_cast<const T*>(to));
        }
      }
    });
  });
}

template <class T>
void rescale_as(const View& g_mean, const View& g_scale, const View& g_shared, const View& g_nll,
                const View& g_loss, double beta, Reduction reduction, int64_t samples, int64_t batch,
                const View& g_log_q, const View& g_log_p, const View& g_scalar) {
  const RowValues<T> nll(g_nll, batch), loss(g_loss, batch);
  const int64_t rows = samples * batch;
  const T share = row_share<T>(rows, samples, reduction);
  const auto factor = [&](int64_t n) { return loss[n % loss.batch] + nll[n] / share; };
  const bool unit = rows == 0 || (!g_nll && loss.stride == 0 && factor(0) == T(1));
  if (!unit) {
    rescale_rows<T>(g_mean, factor);
    if (g_scale) rescale_rows<T>(g_scale, factor);
  }
  if (g_shared) {
    const RowValues<T> part(g_shared, batch);
    const auto term = [&](int64_t n) { return factor(n) * part[n]; };
    store_scalar(g_scalar, tree_sum<T>(0, rows, term));
  }
  latent_gradients<T>(rows, beta, share, loss, g_log_q, g_log_p);
}

}  // namespace

void likelihood_forward(const View& x, const View& mean, const View& scale, const View& mask,
                        const View& log_q, const View& log_p, const LikelihoodOptions& options,
                        const View& nll, const View& loss) {
  const auto run = is_double(mean) ? likelihood_forward_as<double> : likelihood_forward_as<float>;
  run(x, mean, scale, mask, log_q, log_p, options, nll, loss);
}

void likelihood_backward(const View& g_nll, const View& g_loss, const View& x, const View& mean,
                         const View& scale, const View& mask, const LikelihoodOptions& options,
                         const View& g_x, const View& g_mean, const View& g_scale,
                         const View& g_log_q, const View& g_log_p) {
  const auto run = is_double(mean) ? likelihood_backward_as<double> : likelihood_backward_as<float>;
  run(g_nll, g_loss, x, mean, scale, mask, options, g_x, g_mean, g_scale, g_log_q, g_log_p);
}

void likelihood_forward_grad(const View& x, const View& mean, const View& scale, const View& mask,
                             const View& log_q, const View& log_p,
                             const LikelihoodOptions& options, const View& g_mean,
                             const View& g_scale, const View& nll, const View& loss,
                             const View& g_shared) {
  const auto run = is_double(mean) ? forward_grad_as<double> : forward_grad_as<float>;
  run(x, mean, scale, mask, log_q, log_p, options, g_mean, g_scale, nll, loss, g_shared);
}

void likelihood_rescale(const View& g_mean, const View& g_scale, const View& g_shared,
                        const View& g_nll, const View& g_loss, double beta, Reduction reduction,
                        int64_t samples, int64_t batch, const View& g_log_q, const View& g_log_p,
                        const View& g_scalar) {
  const auto run = is_double(g_mean) ? rescale_as<double> : rescale_as<float>;
  run(g_mean, g_scale, g_shared, g_nll, g_loss, beta, reduction, samples, batch, g_log_q, g_log_p,
      g_scalar);
}

}  // namespace vae_fast
