// One element of each likelihood: −log p(x|m, τ) and its derivatives, as in vae_fast/reference.py.
#pragma once

#include <algorithm>

#include "math.h"

namespace vae_fast {

// The order is the op schema's integer code; vae_fast/ops.py holds the same list.
enum class Family : int { gaussian, laplace, bernoulli, logistic, student_t, squared_error };

constexpr bool has_scale(Family family) {
  return family != Family::bernoulli && family != Family::squared_error;
}

// The terms of Student's −log p that do not depend on the element. For many degrees of freedom the
// two logarithms cancel, and their difference comes from Stirling's series.
inline double student_t_constant(double df) {
  if (df > 100) {
    const double square = df * df;
    return kHalfLog2Pi + (0.25 - (1.0 / 24 - 0.05 / square) / square) / df;
  }
  return std::lgamma(0.5 * df) - std::lgamma(0.5 * (df + 1)) +
         0.5 * std::log(3.14159265358979323846 * df);
}

// What an element needs besides x, m and its scale.
template <class T>
struct Model {
  T df = 1, inverse_root_df = 1, log_df = 0;  // Student's ν
  T mul = 1, add = 0;                            // x is level·mul + add, where it lies on levels
  T log_mul = 0, first_edge = 0, last_edge = 0;  // of their bins, as wide as they are apart
  T constant = 0;                                // of every element's value
  T lo = -INFINITY, hi = INFINITY;  // of the raw scale, for kernels with bounds

  Model() = default;
  Model(Family family, double df_, double mul_, double add_)
      : mul(static_cast<T>(mul_)), add(static_cast<T>(add_)) {
    if (family == Family::gaussian) constant = static_cast<T>(kHalfLog2Pi);
    if (family == Family::laplace) constant = static_cast<T>(std::log(2.0));
    if (family == Family::student_t) {
      df = static_cast<T>(df_);
      inverse_root_df = static_cast<T>(1 / std::sqrt(df_));
      log_df = static_cast<T>(std::log(df_));
      constant = static_cast<T>(student_t_constant(df_));
    }
    if (family == Family::logistic) {
      log_mul = static_cast<T>(std::log(mul_));
      first_edge = static_cast<T>(add_ + 0.5 * mul_);
      last_edge = static_cast<T>(add_ + 254.5 * mul_);
    }
  }
};

// value: −log p without the model's constant. d_x: its derivative by x, which is minus the one by m,
// except for Bernoulli's, where only the latter is meant. d_log_scale(w): its derivative by log τ,
// times w.
template <class F, Family family>
struct Element;

template <class F>
struct Element<F, Family::gaussian> {
  using T = typename Traits<F>::Scalar;
  F value, d_x, half;
  template <class S>
  VAE_FAST_INLINE Element(F x, F m, const S& s, const Model<T>&) {
    const Standardized<F> r(x - m, s);
    half = r.half_square;
    value = half + s.log_sigma;
    d_x = r.over_variance;
  }
  VAE_FAST_INLINE F d_log_scale(F w) const { return (half * T(-2) + T(1)) * w; }
};

template <class F>
struct Element<F, Family::laplace> {
  F value, d_x, slope;
  template <class S>
  VAE_FAST_INLINE Element(F x, F m, const S& s, const Model<typename Traits<F>::Scalar>&) {
    using T = typename Traits<F>::Scalar;
    const auto inverse = s.inverse();
    const F r = inverse.times(x - m), size = absolute(r);
    value = size + s.log_sigma;
    // The sign of r; 0 for 0, and NaN for NaN.
    const F sign = select(r > T(0), splat<F>(T(1)), select(r < T(0), splat<F>(T(-1)), r));
    d_x = inverse.times(sign);
    slope = T(1) - size;
  }
  VAE_FAST_INLINE F d_log_scale(F w) const { return slope * w; }
};

template <class F>
struct Element<F, Family::bernoulli> {
  F value, d_x;
  template <class S>
  VAE_FAST_INLINE Element(F x, F m, const S&, const Model<typename Traits<F>::Scalar>&) {
    using T = typename Traits<F>::Scalar;
    const Negative<F> negative(m);
    const F w = exp_any(negative.choose(m, -m));
    value = negative.choose(-x, T(1) - x) * m + log1p_unit(w);
    d_x = x - negative.choose(w, splat<F>(T(1))) / (w + T(1));
  }
};

template <class F>
struct Element<F, Family::logistic> {
  F value, d_x, slope;
  template <class S>
  VAE_FAST_INLINE Element(F x, F m, const S& s,
                          const Model<typename Traits<F>::Scalar>& model) {
    using T = typename Traits<F>::Scalar;
    // The bin's bounds, of which the first level lacks the lower and the last the upper one: by
    // comparison, since the sign of a difference that is NaN says nothing.
    const auto inverse = s.inverse();
    const F one = splat<F>(T(1)), infinite = splat<F>(INFINITY);
    const Negative<F> first(select(x < model.first_edge, -one, one));
    const Negative<F> last(select(x > model.last_edge, -one, one));
    const T half = model.mul * T(0.5);
    const F p = last.choose(infinite, inverse.times(x - m + half));
    const F q = first.choose(-infinite, inverse.times(x - m - half));
    // The mass is e^min(p, 0)/(1 + a) · e^−max(q, 0)/(1 + b) · (1 − e^−w). The last factor is 1 for a
    // large w, and where a bound is infinite; for a small one it is made without its own factor w,
    // whose logarithm is exact.
    const F most = splat<F>(T(1000));  // whose e^−w is 0
    const F w_any = inverse.times(splat<F>(model.mul));
    const F w = first.choose(most, last.choose(most, select(w_any > most, most, w_any)));
    const Negative<F> below(p), above(-q), narrow(w - T(0.34));
    const F a = exp_any(below.choose(p, -p)), b = exp_any(above.choose(-q, q)), c = exp_any(-w);
    const F lost = narrow.choose(exp_rest_near_zero(-w) * w, c), width = T(1) - lost;
    const F a1 = a + T(1), b1 = b + T(1), ab1 = a1 * b1;
    const F over = T(1) / (ab1 * width), over_ab1 = over * width, over_width = over * ab1;
    // log(1 + y): what u was rounded by is added to first order.
    const F y = (b1 * a + b + lost) * over_width, u = y + T(1);
    const F log_u = log_normal(u) + (y - (u - T(1))) * (over_ab1 * width);
    value = below.choose(-p, F{}) + above.choose(q, F{}) +
            (log_u - narrow.choose(model.log_mul - s.log_sigma, F{}));
    const F sigma_p = below.choose(one, a) * (b1 * over_ab1);
    const F sigma_q = above.choose(one, b) * (a1 * over_ab1);
    // Of their difference no rounding of either is left.
    const F change = T(1) - a * b;
    d_x = inverse.times(above.choose(change, below.choose(-change, b - a)) * over_ab1);
    // Where a sigmoid is zero, so is its product with a bound, which may be infinite.
    slope = select(sigma_p == T(0), F{}, p * sigma_p) - select(sigma_q == T(0), F{}, q * sigma_q) +
            narrow.choose(one, w) * c * over_width;
  }
  VAE_FAST_INLINE F d_log_scale(F w) const { return slope * w; }
};

template <class F>
struct Element<F, Family::student_t> {
  F value, d_x, slope;
  template <class S>
  VAE_FAST_INLINE Element(F x, F m, const S& s,
                          const Model<typename Traits<F>::Scalar>& model) {
    using T = typename Traits<F>::Scalar;
    constexpr T kFar = sizeof(T) == 4 ? T(1e15) : T(1e150);
    const T df = model.df, more = df + T(1);
    const auto inverse = s.inverse();
    const F d = x - m, r = inverse.times(d) * model.inverse_root_df, size = absolute(r);  // over √ν
    // log(1 + r²), which is log r² where that may overflow, and r itself.
    const F one = splat<F>(T(1));
    const Negative<F> near(select(size > kFar, one, -one));  // a NaN is near, and stays one
    const F t = near.choose(r, F{}), q = t * t, u = q + T(1);
    const F quotient = T(1) / near.choose(u, d);  // one division for all
    // What u was rounded by is added to first order.
    const F log_u = log_any(near.choose(u, absolute(d)));
    const F log_near = log_u + (q - (u - T(1))) * quotient;
    const F log_far = (log_u - s.log_sigma) * T(2) - model.log_df;
    value = near.choose(log_near, log_far) * (more * T(0.5)) + s.log_sigma;
    // (ν + 1)·t/(1 + t²)/√ν/τ, or (ν + 1)/d.
    const F share = t * quotient;
    d_x = near.choose(inverse.times(share * (more * model.inverse_root_df)), quotient * more);
    // 1 − (ν + 1)·t²/(1 + t²), whose t² may be far above 1 and ν far below.
    slope = near.choose(quotient - t * share * df, splat<F>(-df));
  }
  VAE_FAST_INLINE F d_log_scale(F w) const { return slope * w; }
};

template <class F>
struct Element<F, Family::squared_error> {
  F value, d_x;
  template <class S>
  VAE_FAST_INLINE Element(F x, F m, const S&, const Model<typename Traits<F>::Scalar>&) {
    using T = typename Traits<F>::Scalar;
    d_x = x - m;
    value = d_x * T(0.5) * d_x;
  }
};

}  // namespace vae_fast
