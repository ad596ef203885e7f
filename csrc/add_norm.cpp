#include "add_norm.h"

#include <cmath>
#include <cstring>

#include "dropout.h"
#include "isa.h"
#include "rows.h"

namespace hubert_ecg {
namespace {

#define HUBERT_ECG_SIMD_FILE "add_norm_simd.h"
#include "every_isa.h"

template <class X>
void forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps, double p,
             const Tensor& seed, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  using T = Wide<X>;
  const char* const op = "add_norm";
  const int64_t N = check_rows<X>(x, op), D = x.size(1);
  check_like<T>(residual, x, op, "residual");
  check_like<T>(y, x, op, "y");
  check_vector<T>(weight, D, op, "weight");
  check_vector<T>(bias, D, op, "bias");
  check_vector<T>(mean, N, op, "mean");
  check_vector<T>(rstd, N, op, "rstd");
  const int64_t* const key = check_seed(seed, op);
  HUBERT_ECG_BEST(forward_rows<X>)
  (x.data<X>(), residual.data<T>(), weight.data<T>(), bias.data<T>(), N, D, static_cast<T>(eps), p, key, y.data<T>(),
   mean.data<T>(), rstd.data<T>());
}

template <class X>
void backward(const Tensor& grad, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& mean,
              const Tensor& rstd, double p, const Tensor& seed, const Tensor& to_x, const Tensor& to_residual,
              const Tensor& to_weight, const Tensor& to_bias) {
  using T = Wide<X>;
  const char* const op = "add_norm_backward";
  const int64_t N = check_rows<X>(x, op), D = x.size(1);
  check_like<T>(grad, x, op, "grad");
  check_like<T>(residual, x, op, "residual");
  check_like<X>(to_x, x, op, "to_x");
  check_like<T>(to_residual, x, op, "to_residual");
  check_vector<T>(weight, D, op, "weight");
  check_vector<T>(mean, N, op, "mean");
  check_vector<T>(rstd, N, op, "rstd");
  check_vector<T>(to_weight, D, op, "to_weight");
  check_vector<T>(to_bias, D, op, "to_bias");
  const int64_t* const key = check_seed(seed, op);
  std::vector<T> sums(2 * D);
  for_rows(N, 2 * D, sums.data(), [&](int64_t first, int64_t last, T* partial) {
    HUBERT_ECG_BEST(backward_rows<X>)
    (grad.data<T>(), x.data<X>(), residual.data<T>(), weight.data<T>(), mean.data<T>(), rstd.data<T>(), first, last, D,
     p, key, to_x.data<X>(), to_residual.data<T>(), partial);
  });
  std::copy(sums.data(), sums.data() + D, to_weight.data<T>());
  std::copy(sums.data() + D, sums.data() + 2 * D, to_bias.data<T>());
}

}  // namespace

void add_norm_cpu(Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps, double dropout_p, Tensor seed,
                  Tensor y, Tensor mean, Tensor rstd) {
  of_type(x, [&](auto one) { forward<decltype(one)>(x, residual, weight, bias, eps, dropout_p, seed, y, mean, rstd); });
}

void add_norm_backward_cpu(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd,
                           double dropout_p, Tensor seed, Tensor to_x, Tensor to_residual, Tensor to_weight,
                           Tensor to_bias) {
  of_type(x, [&](auto one) {
    backward<decltype(one)>(grad, x, residual, weight, mean, rstd, dropout_p, seed, to_x, to_residual, to_weight,
                            to_bias);
  });
}

}  // namespace hubert_ecg
