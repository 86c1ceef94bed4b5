// The latent pass of passes.h: the loops of latent.h over tiles of the operands.

#define VAE_FAST_KERNELS "latent.h"
#include "each_isa.h"
#include "operand.h"
#include "parallel.h"
#include "passes.h"

#include <vector>

namespace vae_fast {
namespace {

template <class T>
LatentKernels<T> latent_kernels(Param param, bool path);
template <>
LatentKernels<double> latent_kernels(Param param, bool path) {
  return base::latent_kernels<double>(param, path);
}
template <>
LatentKernels<float> latent_kernels(Param param, bool path) {
  VAE_FAST_SELECT(latent_kernels, param, path)
}

// A latent tensor as rows with one element stride. The order of latent elements is the order of the
// noise, so no dimension moves.
struct LatentOperand : Operand {
  LatentOperand() { straight = true; }
  explicit LatentOperand(const View& t, int64_t event_from = 1)
      : Operand(operand(t, event_from)) {
    Event event = event_of(t, event_from);
    event.fuse<1>({this}, /*reorder=*/false);
    straight |= t.numel() == 0;
  }

  // The elements of each row from `begin` on, if they are T, one behind the other.
  template <class T>
  Rows<const T> in_place(int64_t offset, int64_t begin) const {
    if (!*this || type != type_of<T> || strides[0] != 1) return {};
    return {reinterpret_cast<const T*>(at(offset + begin)), row_stride};
  }
  // n elements of each row as T: in place where they already are so, else gathered into `buffer`.
  template <class T>
  Rows<const T> load(int64_t offset, int64_t rows, int64_t begin, int64_t n, T* buffer) const {
    if (const Rows<const T> there = in_place<T>(offset, begin); there.data) return there;
    const int64_t stride = strides[0];
    offset += begin * stride;
    const bool joined = row_stride == n * stride;
    gather(*this, joined ? run_of(offset, stride, rows * n) : Block{offset, row_stride, rows, stride, n},
           buffer);
    return {buffer, n};
  }
};

// What both directions share: μ and the scale by rows of L elements, and the noise of a group of
// rows. Short rows are grouped, since rows and samples that follow each other have one run of noise.
template <class T>
struct Latent {
  static constexpr int64_t kLanes = sizeof(T) == 4 ? 4 : 2;  // normals per Philox call
  static constexpr int64_t kCalls = kTile / kLanes;          // Philox calls per tile

  int64_t batch, samples, size, calls, group, pieces, together, first_row;
  uint64_t seed, offset;
  bool scalar;
  LatentOperand mu, scale;
  T shared[kTile];  // a 0-dim scale, repeated
  LatentKernels<T> kernels;
  TileKernels<T> tiles;
  Clamp clamp;

  Latent(const View& mu_, const View& scale_, const View& key, const LatentOptions& options)
      : batch(mu_.sizes[0]),
        samples(std::max<int64_t>(options.num_samples, 1)),
        size(event_of(mu_).numel()),
        calls((size + kLanes - 1) / kLanes),
        group(std::max<int64_t>(1, kCalls / std::max<int64_t>(1, calls * samples))),
        pieces((size + kTile - 1) / kTile),
        together(std::clamp<int64_t>(kCalls / std::max<int64_t>(1, calls), 1, samples)),
        first_row(options.first_row),
        scalar(scale_.dim == 0),
        mu(mu_),
        kernels(latent_kernels<T>(static_cast<Param>(options.param), options.path)),
        tiles(tile_kernels<T>(static_cast<Param>(options.param))),
        clamp{options.lo, options.hi, options.soft != 0} {
    if (scalar) {
      std::fill(shared, shared + std::min(size, kTile), scalar_value<T>(scale_));
    } else {
      scale = LatentOperand(scale_);
    }
    STD_TORCH_CHECK(mu.straight && scale.straight, "vae_fast: a latent tensor needs a copy first");
    const uint64_t* bits = data_of<uint64_t>(key);
    seed = bits[0];
    offset = bits[key.strides[0]];
  }

  // Calls fn(b, rows, begin, n) for the tiles of the latent, in parallel: `rows` whole rows from row
  // b on, or n elements from `begin` of one long row.
  template <class Fn>
  void for_tiles(const Fn& fn) const {
    const int64_t cost = 4 * group * std::min(size, kTile) * samples;
    parallel_parts((batch + group - 1) / group * pieces, cost, [&](const auto& parts) {
      parts([&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile) {
          const int64_t b = tile / pieces * group, begin = tile % pieces * kTile;
          fn(b, std::min(group, batch - b), begin, std::min(size - begin, kTile));
        }
      });
    });
  }

  // Calls fn(k, eps) for every sample k of a tile, with its noise; ahead_of(k) is what fn will
  // want for k, the first of the samples whose noise is made at once.
  template <class AheadOf, class Fn>
  void for_samples(int64_t b, int64_t rows, int64_t begin, const AheadOf& ahead_of,
                   const Fn& fn) const {
    alignas(64) T eps[kTile + 64];  // room for the last block of 16 counters
    const int64_t per_row = std::min(calls - begin / kLanes, kCalls);
    for (int64_t first = 0; first < samples; first += together) {
      const int64_t count = std::min(together, samples - first);
      const uint64_t row = (uint64_t(first_row) + b) * samples + first;
      kernels.noise(rows * count * per_row, offset + row * calls + begin / kLanes,
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), ahead_of(first),
                    eps);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t pitch = per_row * kLanes;
        fn(first + k, Rows<const T>{eps + k * pitch, count * pitch});
      }
    }
  }

  Rows<const T> load_mu(int64_t b, int64_t rows, int64_t begin, int64_t n, T* buffer) const {
    return mu.load(b * mu.row_stride, rows, begin, n, buffer);
  }
  // What of both is not copied into a buffer.
  void add_to(Ahead& ahead, int64_t b, int64_t rows, int64_t begin, int64_t n) const {
    ahead.add(mu.template in_place<T>(b * mu.row_stride, begin), rows, n);
    ahead.add(scale.template in_place<T>(b * scale.row_stride, begin), rows, n);
  }
  // The scale within its bounds, and the derivative of that.
  Rows<const T> load_scale(int64_t b, int64_t rows, int64_t begin, int64_t n, T* buffer,
                           T* slope) const {
    const Rows<const T> raw = scalar ? Rows<const T>{shared, 0}
                                     : scale.load(b * scale.row_stride, rows, begin, n, buffer);
    if (!clamp.active()) return raw;
    for (int64_t row = 0; row < rows; ++row) {
      tiles.prepare_scale(n, clamp, false, raw[row], buffer + row * n, slope + row * n);
    }
    return {buffer, n};
  }
};

template <class T>
void latent_forward_as(const View& mu, const View& scale, const View& key,
                       const LatentOptions& options, const View& z, const View& log_q,
                       const View& log_p) {
  const Latent<T> latent(mu, scale, key, options);
  T* const q = data_of<T>(log_q);
  T* const p = data_of<T>(log_p);
  const int64_t count = latent.samples * latent.batch, pieces = latent.pieces;
  const T constant = static_cast<T>(-kHalfLog2Pi * latent.size);
  // The sums of long rows' pieces, which have no order among threads.
  const bool whole = pieces <= 1;
  std::vector<T> q_parts(whole ? 0 : count * pieces), p_parts(q_parts.size());
  T* const q_sums = whole ? q : q_parts.data();
  T* const p_sums = whole ? p : p_parts.data();
  if (whole) {
    std::fill(q, q + count, constant);
    std::fill(p, p + count, constant);
  }

  const Output<T> out(z);
  latent.for_tiles([&](int64_t b, int64_t group, int64_t begin, int64_t n) {
    alignas(64) T mu_tile[kTile], scale_tile[kTile], slope[kTile], z_tile[kTile];
    const Rows<const T> mus = latent.load_mu(b, group, begin, n, mu_tile);
    const Rows<const T> scales = latent.load_scale(b, group, begin, n, scale_tile, slope);
    const auto offset_of = [&](int64_t k) { return (k * latent.batch + b) * latent.size + begin; };
    const auto ahead_of = [&](int64_t k) {
      Ahead ahead;
      latent.add_to(ahead, b, group, begin, n);
      ahead.add(Rows<const T>{out.target(offset_of(k), nullptr), n}, group, n);
      return ahead;
    };
    latent.for_samples(b, group, begin, ahead_of, [&](int64_t k, Rows<const T> eps) {
      const int64_t row = k * latent.batch + b, at = offset_of(k);
      T* const to = out.target(at, z_tile);
      const int64_t sum = row * pieces + begin / kTile;
      latent.kernels.forward(group, n, mus, scales, eps, {to, n}, q_sums + sum, p_sums + sum);
      out.store(at, group * n, to);
    });
  });
  for (int64_t row = 0; !whole && row < count; ++row) {
    const int64_t first = row * pieces, last = first + pieces;
    q[row] = constant + tree_sum<T>(first, last, [&](int64_t i) { return q_parts[i]; });
    p[row] = constant + tree_sum<T>(first, last, [&](int64_t i) { return p_parts[i]; });
  }
}

template <class T>
void latent_backward_as(const View& g_z, const View& g_log_q, const View& g_log_p, const View& mu,
                        const View& scale, const View& key, const LatentOptions& options,
                        const View& g_mu, const View& g_scale) {
  const Latent<T> latent(mu, scale, key, options);
  const Output<T> out_mu(g_mu), out_scale(g_scale);
  std::vector<T> g_shared(latent.scalar ? latent.batch * latent.pieces : 0);

  const bool sampled = options.num_samples > 0;
  LatentOperand upstream;
  if (g_z) upstream = LatentOperand(g_z, sampled ? 2 : 1);
  STD_TORCH_CHECK(upstream.straight, "vae_fast: a latent tensor needs a copy first");
  const int64_t sample_stride = g_z && sampled ? g_z.strides[0] : 0;
  const RowValues<T> q(g_log_q, latent.batch), p(g_log_p, latent.batch);

  latent.for_tiles([&](int64_t b, int64_t group, int64_t begin, int64_t n) {
    alignas(64) T mu_tile[kTile], scale_tile[kTile], z_tile[kTile], gm_tile[kTile], gs_tile[kTile];
    alignas(64) T slope[kTile];
    const Rows<const T> mus = latent.load_mu(b, group, begin, n, mu_tile);
    const Rows<const T> scales = latent.load_scale(b, group, begin, n, scale_tile, slope);
    const int64_t at = b * latent.size + begin;
    T* const gm = out_mu.target(at, gm_tile);
    T* const gs = latent.scalar ? gs_tile : out_scale.target(at, gs_tile);
    if (!g_z) std::fill(z_tile, z_tile + n, T(0));
    const auto offset_of = [&](int64_t k) { return k * sample_stride + b * upstream.row_stride; };
    const auto ahead_of = [&](int64_t k) {
      Ahead ahead;
      latent.add_to(ahead, b, group, begin, n);
      ahead.add(upstream.template in_place<T>(offset_of(k), begin), group, n);
      ahead.add(Rows<const T>{out_mu.target(at, nullptr), n}, group, n);
      if (!latent.scalar) ahead.add(Rows<const T>{out_scale.target(at, nullptr), n}, group, n);
      return ahead;
    };
    latent.for_samples(b, group, begin, ahead_of, [&](int64_t k, Rows<const T> eps) {
      Rows<const T> g_zs{z_tile, 0};
      if (g_z) g_zs = upstream.load(offset_of(k), group, begin, n, z_tile);
      const int64_t row = k * latent.batch + b;
      latent.kernels.backward(group, n, mus, scales, eps, g_zs, q.from(row), p.from(row), {gm, n},
                              {gs, n}, /*add=*/k > 0);
    });
    if (latent.clamp.active()) scale_by(slope, group * n, gs);
    out_mu.store(at, group * n, gm);
    if (!latent.scalar) out_scale.store(at, group * n, gs);
    for (int64_t i = 0; latent.scalar && i < group; ++i) {
      g_shared[b * latent.pieces + begin / kTile + i] =
          tree_sum<T>(i * n, (i + 1) * n, [&](int64_t j) { return gs[j]; });
    }
  });
  if (latent.scalar) {
    const int64_t parts = latent.batch * latent.pieces;
    store_scalar(g_scale, tree_sum<T>(0, parts, [&](int64_t i) { return g_shared[i]; }));
  }
}

}  // namespace

bool is_straight(const View& t, int64_t event_from) {
  return t.dim < event_from || LatentOperand(t, event_from).straight;
}

void latent_forward(const View& mu, const View& scale, const View& key, const LatentOptions& options,
                    const View& z, const View& log_q, const View& log_p) {
  const auto run = is_double(mu) ? latent_forward_as<double> : latent_forward_as<float>;
  run(mu, scale, key, options, z, log_q, log_p);
}

void latent_backward(const View& g_z, const View& g_log_q, const View& g_log_p, const View& mu,
                     const View& scale, const View& key, const LatentOptions& options,
                     const View& g_mu, const View& g_scale) {
  const auto run = is_double(mu) ? latent_backward_as<double> : latent_backward_as<float>;
  run(g_z, g_log_q, g_log_p, mu, scale, key, options, g_mu, g_scale);
}

}  // namespace vae_fast
