#include "add_norm.h"

#include <cmath>
#include <cstring>

#include "dropout.h"
#include "isa.h"
#include "row_sums.h"

namespace hubert_ecg {
namespace {

#define HUBERT_ECG_SIMD_FILE "add_norm_simd.h"
#include "every_isa.h"

template <class T>
bool is_rows(const Tensor& x) {
  return x.is<T>() && x.contiguous() && x.ndim() == 2;
}

template <class T>
void check_like(const Tensor& x, const Tensor& like, const char* op, const char* name) {
  HUBERT_ECG_CHECK(is_rows<T>(x) && x.size(0) == like.size(0) && x.size(1) == like.size(1), op, ": ", name,
                   " must be like x, ", like, ", got ", x);
}

template <class T>
void check_vector(const Tensor& x, int64_t size, const char* op, const char* name) {
  HUBERT_ECG_CHECK(x.is<T>() && x.contiguous() && x.ndim() == 1 && x.size(0) == size, op, ": ", name,
                   " must be contiguous [", size, "] of the dtype of x, got ", x);
}

template <class T>
void forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps, double p,
             const Tensor& seed, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const char* const op = "add_norm";
  HUBERT_ECG_CHECK(is_rows<T>(x), op, ": x must be contiguous float32 or float64 [N, D], got ", x);
  check_like<T>(residual, x, op, "residual");
  check_like<T>(y, x, op, "y");
  const int64_t N = x.size(0), D = x.size(1);
  check_vector<T>(weight, D, op, "weight");
  check_vector<T>(bias, D, op, "bias");
  check_vector<T>(mean, N, op, "mean");
  check_vector<T>(rstd, N, op, "rstd");
  HUBERT_ECG_CHECK(seed.is<int64_t>(), op, ": seed must be int64, got ", seed);
  HUBERT_ECG_BEST(forward_rows<T>)
  (x.data<T>(), residual.data<T>(), weight.data<T>(), bias.data<T>(), N, D, static_cast<T>(eps), p,
   seed.data<int64_t>(), y.data<T>(), mean.data<T>(), rstd.data<T>());
}

template <class T>
void backward(const Tensor& grad, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& mean,
              const Tensor& rstd, double p, const Tensor& seed, const Tensor& to_x, const Tensor& to_residual,
              const Tensor& to_weight, const Tensor& to_bias) {
  const char* const op = "add_norm_backward";
  HUBERT_ECG_CHECK(is_rows<T>(x), op, ": x must be contiguous float32 or float64 [N, D], got ", x);
  check_like<T>(grad, x, op, "grad");
  check_like<T>(residual, x, op, "residual");
  check_like<T>(to_x, x, op, "to_x");
  check_like<T>(to_residual, x, op, "to_residual");
  const int64_t N = x.size(0), D = x.size(1);
  check_vector<T>(weight, D, op, "weight");
  check_vector<T>(mean, N, op, "mean");
  check_vector<T>(rstd, N, op, "rstd");
  check_vector<T>(to_weight, D, op, "to_weight");
  check_vector<T>(to_bias, D, op, "to_bias");
  HUBERT_ECG_CHECK(seed.is<int64_t>(), op, ": seed must be int64, got ", seed);
  std::vector<T> sums(2 * D);
  for_rows(N, 2 * D, sums.data(), [&](int64_t first, int64_t last, T* partial) {
    HUBERT_ECG_BEST(backward_rows<T>)
    (grad.data<T>(), x.data<T>(), residual.data<T>(), weight.data<T>(), mean.data<T>(), rstd.data<T>(), first, last, D,
     p, seed.data<int64_t>(), to_x.data<T>(), to_residual.data<T>(), partial);
  });
  std::copy(sums.data(), sums.data() + D, to_weight.data<T>());
  std::copy(sums.data() + D, sums.data() + 2 * D, to_bias.data<T>());
}

}  // namespace

void add_norm_cpu(Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps, double dropout_p, Tensor seed,
                  Tensor y, Tensor mean, Tensor rstd) {
  const auto run = x.is<double>() ? forward<double> : forward<float>;
  run(x, residual, weight, bias, eps, dropout_p, seed, y, mean, rstd);
}

void add_norm_backward_cpu(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd,
                           double dropout_p, Tensor seed, Tensor to_x, Tensor to_residual, Tensor to_weight,
                           Tensor to_bias) {
  const auto run = x.is<double>() ? backward<double> : backward<float>;
  run(grad, x, residual, weight, mean, rstd, dropout_p, seed, to_x, to_residual, to_weight, to_bias);
}

}  // namespace hubert_ecg
