// KL(q‖p) and the importance-weighted bound of passes.h: the loops of objective.h over tiles.

#define VAE_FAST_KERNELS "objective.h"
#include "each_isa.h"
#include "operand.h"
#include "parallel.h"
#include "passes.h"

#include <algorithm>
#include <array>
#include <vector>

namespace vae_fast {
namespace {

template <class T>
KlKernels<T> kl_kernels(bool prior);
template <>
KlKernels<double> kl_kernels(bool prior) {
  return base::kl_kernels<double>(prior);
}
template <>
KlKernels<float> kl_kernels(bool prior) {
  VAE_FAST_SELECT(kl_kernels, prior)
}

template <class T>
ImportanceKernel<T> importance_kernel();
template <>
ImportanceKernel<double> importance_kernel() {
  return base::importance_kernel<double>();
}
template <>
ImportanceKernel<float> importance_kernel() {
  VAE_FAST_SELECT(importance_kernel)
}

// Elements that are worked on at once, kTile of these at most: `n` of each of `rows` rows.
struct Area {
  int64_t row, rows, begin, n;
  int64_t count() const { return rows * n; }
};

// q and p by areas, with both scales as log σ.
//
// An area's elements lie row by row, and short rows are grouped; or, where the rows of all tensors are
// columns in memory, element by element of a few columns. Threads share out groups of rows, and of
// long ones chunks, whose length does not depend on who is there to help.
template <class T>
struct Kl {
  static constexpr int64_t kColumns = kTile / 4, kChunk = 32 * kTile;

  Operand mu, scale, prior_mu, prior_scale, g_mu, g_scale, g_prior_mu, g_prior_scale;
  Event event;
  int64_t rows, size;
  Clamp clamp;
  TileKernels<T> posterior, prior;
  KlKernels<T> kernels;
  bool by_columns = false;
  int64_t together, length, chunks;  // rows of an area and their elements; chunks of a group of rows

  Kl(const View& mu_, const View& scale_, const View& prior_mu_, const View& prior_scale_,
     const KlOptions& options)
      : mu(operand(mu_)),
        scale(operand(scale_)),
        event(event_of(mu_)),
        rows(mu_.sizes[0]),
        size(event.numel()),
        clamp{options.lo, options.hi, options.soft != 0},
        posterior(tile_kernels<T>(static_cast<Param>(options.param))),
        prior(tile_kernels<T>(static_cast<Param>(options.prior_param))),
        kernels(kl_kernels<T>(prior_mu_.present)) {
    if (prior_mu_) prior_mu = operand(prior_mu_);
    if (prior_scale_) prior_scale = operand(prior_scale_);
  }

  void fuse() {
    const std::array<Operand*, 8> all{&mu,   &scale,   &prior_mu,   &prior_scale,
                                      &g_mu, &g_scale, &g_prior_mu, &g_prior_scale};
    event.fuse(all, /*reorder=*/true);
    by_columns = rows > 1 && mu.row_stride > 0 && mu.row_stride < mu.strides.back() &&
                 std::all_of(all.begin(), all.end(), [](Operand* o) { return !*o || o->straight; });
    together = by_columns ? std::min(rows, kColumns)
                          : std::max<int64_t>(kTile / std::max<int64_t>(size, 1), 1);
    length = kTile / together;
    chunks = std::max<int64_t>((size * together + kChunk - 1) / kChunk, 1);
  }

  // The operands of an area, and the derivatives of the two log σ by the raw scales.
  struct Tile {
    alignas(64) T mu_buffer[kTile], log_scale[kTile], slope[kTile];
    alignas(64) T prior_mu_buffer[kTile], prior_log_scale[kTile], prior_slope[kTile];
    const T *mu, *prior_mu = nullptr;
  };

  // Calls fn(tile, area, chunk), in order within a chunk of a group of rows.
  template <class Fn>
  void for_areas(const Fn& fn) const {
    const int64_t groups = (rows + together - 1) / together;
    const int64_t areas = (size + length - 1) / length;  // of a group
    parallel_parts(groups * chunks, together * size / chunks, [&](const auto& parts) {
      Tile tile;
      parts([&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = i / chunks * together, chunk = i % chunks;
          const int64_t end = std::min(areas * (chunk + 1) / chunks * length, size);
          for (int64_t begin = areas * chunk / chunks * length; begin < end; begin += length) {
            const Area area{row, std::min(together, rows - row), begin,
                            std::min(end - begin, length)};
            fetch(g_mu, area);
            fetch(g_scale, area);
            load(tile, area);
            fn(tile, area, chunk);
          }
        }
      });
    });
  }

  // Where an area's elements may be written: where they belong or in `buffer`, then store().
  T* target(const Operand& o, const Area& a, T* buffer) const {
    return joined(o, a) && o.type == type_of<T> ? reinterpret_cast<T*>(o.at(start(o, a))) : buffer;
  }
  void store(const Operand& o, const Area& a, const T* from) const {
    if (target(o, a, nullptr) == from) return;
    for_blocks(o, a, [&](const Block& b, int64_t first) { scatter(o, b, from + first); });
  }

 private:
  void load(Tile& tile, const Area& a) const {
    tile.mu = load(mu, a, tile.mu_buffer);
    posterior.prepare_scale(a.count(), clamp, true, load(scale, a, tile.log_scale), tile.log_scale,
                            tile.slope);
    if (!prior_mu) return;
    constexpr Clamp kUnclamped{-INFINITY, INFINITY, false};
    tile.prior_mu = load(prior_mu, a, tile.prior_mu_buffer);
    prior.prepare_scale(a.count(), kUnclamped, true, load(prior_scale, a, tile.prior_log_scale),
                        tile.prior_log_scale, tile.prior_slope);
  }

  const T* load(const Operand& o, const Area& a, T* buffer) const {
    const T* const there = target(o, a, buffer);
    if (there != buffer) return there;
    for_blocks(o, a, [&](const Block& b, int64_t first) { gather(o, b, buffer + first); });
    return buffer;
  }

  // Begins to fetch memory that is about to be written, while its tile is prepared.
  void fetch(const Operand& o, const Area& a) const {
    if (!o) return;
    const T* const there = target(o, a, nullptr);
    if (there == nullptr) return;
    for (int64_t i = 0; i < a.count(); i += 64 / sizeof(T)) __builtin_prefetch(there + i, 1);
  }

  static int64_t start(const Operand& o, const Area& a) {
    return a.row * o.row_stride + a.begin * o.strides.back();
  }
  // Whether an area's elements lie in memory as they do in a tile.
  bool joined(const Operand& o, const Area& a) const {
    const int64_t row = o.row_stride, element = o.strides.back();
    if (!o.straight) return false;
    return by_columns ? row == 1 && (a.n == 1 || element == a.rows)
                      : (a.n == 1 || element == 1) && (a.rows == 1 || row == a.n);
  }

  // Calls fn(block, first) for the blocks of an area; `first` is the place of a block's first element.
  template <class Fn>
  void for_blocks(const Operand& o, const Area& a, const Fn& fn) const {
    if (o.straight) {
      const int64_t row = o.row_stride, element = o.strides.back();
      return fn(joined(o, a)  ? run_of(start(o, a), 1, a.count())
                : by_columns ? Block{start(o, a), element, a.n, row, a.rows}
                             : Block{start(o, a), row, a.rows, element, a.n},
                0);
    }
    for (int64_t i = 0; i < a.rows; ++i) {
      event.blocks(o, a.row + i, a.begin, a.n,
                   [&](const Block& b, int64_t first) { fn(b, i * a.n + first); });
    }
  }
};

template <class T>
void kl_forward_as(const View& mu, const View& scale, const View& prior_mu, const View& prior_scale,
                   const KlOptions& options, const View& kl) {
  Kl<T> pass(mu, scale, prior_mu, prior_scale, options);
  pass.fuse();
  T* const out = data_of<T>(kl);
  std::vector<T> rest((pass.chunks - 1) * pass.rows, T(0));  // the sums of all chunks but the first
  std::fill(out, out + pass.rows, T(0));
  const auto add = pass.by_columns ? pass.kernels.add_columns : pass.kernels.add_rows;
  pass.for_areas([&](const typename Kl<T>::Tile& tile, const Area& a, int64_t chunk) {
    alignas(64) T terms[kTile];
    pass.kernels.terms(a.count(), tile.mu, tile.log_scale, tile.prior_mu, tile.prior_log_scale,
                       terms);
    add(a.rows, a.n, terms, a.row + (chunk == 0 ? out : rest.data() + (chunk - 1) * pass.rows));
  });
  for (int64_t i = 0; i < static_cast<int64_t>(rest.size()); ++i) out[i % pass.rows] += rest[i];
}

template <class T>
void kl_backward_as(const View& g_kl, const View& mu, const View& scale, const View& prior_mu,
                    const View& prior_scale, const KlOptions& options, const View& g_mu,
                    const View& g_scale, const View& g_prior_mu, const View& g_prior_scale) {
  Kl<T> pass(mu, scale, prior_mu, prior_scale, options);
  pass.g_mu = operand(g_mu);
  pass.g_scale = operand(g_scale);
  if (prior_mu) {
    pass.g_prior_mu = operand(g_prior_mu);
    pass.g_prior_scale = operand(g_prior_scale);
  }
  pass.fuse();
  const RowValues<T> weight(g_kl, pass.rows);
  pass.for_areas([&](const typename Kl<T>::Tile& tile, const Area& a, int64_t) {
    alignas(64) T values[kTile], weights[kTile + 16];  // a vector more, for repeat_each
    alignas(64) T mu_tile[kTile], scale_tile[kTile], prior_mu_tile[kTile], prior_scale_tile[kTile];
    const int64_t n = a.count();
    for (int64_t i = 0; i < a.rows; ++i) values[i] = weight[a.row + i];
    if (pass.by_columns) {
      std::copy_n(values, a.rows, weights);
      repeat(a.rows, n, weights);
    } else {
      pass.kernels.repeat_each(a.rows, a.n, values, weights);
    }
    T* const to_mu = pass.target(pass.g_mu, a, mu_tile);
    T* const to_scale = pass.target(pass.g_scale, a, scale_tile);
    pass.kernels.gradient(n, weights, tile.mu, tile.log_scale, tile.slope, tile.prior_mu,
                          tile.prior_log_scale, tile.prior_slope, to_mu, to_scale, prior_mu_tile,
                          prior_scale_tile);
    pass.store(pass.g_mu, a, to_mu);
    pass.store(pass.g_scale, a, to_scale);
    if (!prior_mu) return;
    pass.store(pass.g_prior_mu, a, prior_mu_tile);
    pass.store(pass.g_prior_scale, a, prior_scale_tile);
  });
}

template <class T>
void importance_as(const View& nll, const View& log_q, const View& log_p, double beta,
                   const View& bound, const View& weights) {
  const int64_t samples = weights.sizes[0], batch = weights.sizes[1];
  const RowValues<T> t(nll, batch), q(log_q, batch), p(log_p, batch);
  const T b = static_cast<T>(beta);
  T* const w = data_of<T>(weights);
  const ImportanceKernel<T> kernel = importance_kernel<T>();
  const int64_t grain = std::max<int64_t>(64, kGrain / std::max<int64_t>(samples, 1));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = 0; k < samples; ++k) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = k * batch + i;
        w[n] = -(t[n] + b * (q[n] - p[n]));
      }
    }
    kernel(samples, last - first, batch, w + first, data_of<T>(bound) + first);
  });
}

}  // namespace

void gaussian_kl_forward(const View& mu, const View& scale, const View& prior_mu,
                         const View& prior_scale, const KlOptions& options, const View& kl) {
  const auto run = is_double(mu) ? kl_forward_as<double> : kl_forward_as<float>;
  run(mu, scale, prior_mu, prior_scale, options, kl);
}

void gaussian_kl_backward(const View& g_kl, const View& mu, const View& scale, const View& prior_mu,
                          const View& prior_scale, const KlOptions& options, const View& g_mu,
                          const View& g_scale, const View& g_prior_mu, const View& g_prior_scale) {
  const auto run = is_double(mu) ? kl_backward_as<double> : kl_backward_as<float>;
  run(g_kl, mu, scale, prior_mu, prior_scale, options, g_mu, g_scale, g_prior_mu, g_prior_scale);
}

void importance_forward(const View& nll, const View& log_q, const View& log_p, double beta,
                        const View& bound, const View& weights) {
  const auto run = is_double(nll) ? importance_as<double> : importance_as<float>;
  run(nll, log_q, log_p, beta, bound, weights);
}

}  // namespace vae_fast
