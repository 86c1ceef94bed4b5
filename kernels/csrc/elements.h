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
  T df = 1, log_df = 0, far = 1;  // Student's ν, and the r beyond which 1 + r²/ν is r²/ν
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
      log_df = static_cast<T>(std::log(df_));
      far = static_cast<T>((sizeof(T) == 4 ? 1e15 : 1e150) * std::sqrt(std::min(df_, 1.0)));
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

// softplus(v) = log(1 + e^v), and σ(v).
template <class F>
struct Softplus {
  using T = typename Traits<F>::Scalar;
  F value, slope;
  VAE_FAST_INLINE explicit Softplus(F v) {
    const Negative<F> negative(v);
    const F w = exp_any(negative.choose(v, -v));  // a NaN stays one
    value = negative.choose(F{}, v) + log1p_unit(w);
    slope = negative.choose(w, splat<F>(T(1))) / (w + T(1));
  }
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
    const auto inverse = s.inverse();
    const T half = model.mul * T(0.5);
    const F p = inverse.times(x - m + half), q = inverse.times(x - m - half);
    // By comparison, since the sign of a difference that is NaN says nothing.
    const F one = splat<F>(T(1));
    const Negative<F> first(select(x < model.first_edge, -one, one));
    const Negative<F> last(select(x > model.last_edge, -one, one));
    const Softplus<F> below(-p), above(q);
    // The first level has nothing below it, the last nothing above.
    const F sigma_p = last.choose(F{}, below.slope), sigma_q = first.choose(F{}, above.slope);
    value = last.choose(F{}, below.value) + first.choose(F{}, above.value);
    d_x = inverse.times(sigma_q - sigma_p);
    // Where a sigmoid is zero, so is its product with a bound, which may be infinite.
    slope = select(sigma_p == T(0), F{}, p * sigma_p) - select(sigma_q == T(0), F{}, q * sigma_q);

    // −log(1 − e^{−w}) of the levels between, and its derivative w/(e^w − 1).
    const F w_any = inverse.times(splat<F>(model.mul));
    const F w = select(w_any > T(100), splat<F>(T(100)), w_any);
    const ExpMinusOne<F> e(-w);
    const F ratio = e.value / -w;  // (1 − e^{−w})/w, 1 for the smallest w
    const F safe = select(w == T(0), splat<F>(T(1)), ratio);
    const Negative<F> small(w - T(0.3));
    const F log_mass = log_normal(small.choose(safe, -e.value)) +
                       small.choose(model.log_mul - s.log_sigma, F{});
    const F width_slope = (e.value + T(1)) / safe;
    value -= first.choose(F{}, last.choose(F{}, log_mass));
    slope += first.choose(F{}, last.choose(F{}, width_slope));
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
    const T df = model.df, far = model.far;
    const auto inverse = s.inverse();
    const F d = x - m, r = inverse.times(d), size = absolute(r);
    // log(1 + q), q = r²/ν, which is log q where q may overflow, and r itself.
    const F one = splat<F>(T(1));
    const Negative<F> near(select(size > far, one, -one));  // a NaN is near, and stays one
    const F bound = near.choose(size, splat<F>(far)), q = bound * bound / df, u = q + T(1);
    const F log_u = log_any(near.choose(u, absolute(d)));
    const F log_near = select(u == T(1), q, log_u * (q / (u - T(1))));
    const F log_far = (log_u - s.log_sigma) * T(2) - model.log_df;
    value = near.choose(log_near, log_far) * ((df + T(1)) * T(0.5)) + s.log_sigma;
    // (ν + 1)·r/(ν + r²), without the square; or (ν + 1)/r.
    const F g = (df + T(1)) / near.choose(df / r + r, d);
    d_x = near.choose(inverse.times(g), g);
    slope = T(1) - q / u * (df + T(1));
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
