// Work that PyTorch's threads share out among themselves.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace vae_fast {
namespace {

constexpr int64_t kGrain = 16384;        // elements that make another thread worth waking
constexpr int64_t kAlone = kGrain * 64;  // up to which threads are done before help could come

// Runs body(parts) on as many threads as `units` of work with `cost` elements each deserve, where
// parts(fn) calls fn(first, last) for parts of [0, units) until none is left.
//
// A thread takes its own share first, which keeps memory beside whoever had it before, and of much work
// then helps with the shares of others: one may be slower by design, or have lost its processor to a
// data loader. A part is half of what is left of a share, since taking one waits for all stores before
// it.
template <class Body>
void parallel_parts(int64_t units, int64_t cost, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  if (units * cost <= kAlone) {
    torch::stable::parallel_for(0, units, grain, [&](int64_t first, int64_t last) {
      body([&](const auto& fn) { fn(first, last); });
    });
    return;
  }
  struct alignas(64) Share {  // a line of the caches each
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), (units + grain - 1) / grain);
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = units * i / threads;
    shares[i].end = units * (i + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    body([&](const auto& fn) {
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(own + i) % threads];
        int64_t from = share.next.load(std::memory_order_relaxed);
        while (from < share.end) {
          const int64_t to = std::min(from + std::max(grain, (share.end - from) / 2), share.end);
          if (!share.next.compare_exchange_weak(from, to, std::memory_order_relaxed)) continue;
          fn(from, to);
          from = share.next.load(std::memory_order_relaxed);
        }
      }
    });
  });
}

}  // namespace
}  // namespace vae_fast
