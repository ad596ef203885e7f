#include "bias_gelu.h"

#include <cmath>
#include <cstring>

#include "dropout.h"
#include "isa.h"
#include "rows.h"

namespace hubert_ecg {
namespace {

#define HUBERT_ECG_SIMD_FILE "bias_gelu_simd.h"
#include "every_isa.h"

template <class T>
void forward(const Tensor& x, const Tensor& bias, double p, const Tensor& seed, const Tensor& y) {
  const int64_t N = check_rows<T>(x, "bias_gelu"), D = x.size(1);
  check_like<T>(y, x, "bias_gelu", "y");
  check_vector<Wide<T>>(bias, D, "bias_gelu", "bias");
  HUBERT_ECG_BEST(gelu_rows<T>)
  (x.data<T>(), bias.data<Wide<T>>(), N, D, p, check_seed(seed, "bias_gelu"), y.data<T>());
}

template <class T>
void backward(const Tensor& grad, const Tensor& x, const Tensor& bias, double p, const Tensor& seed, const Tensor& to_x,
              const Tensor& to_bias) {
  const char* const op = "bias_gelu_backward";
  const int64_t N = check_rows<T>(x, op), D = x.size(1);
  check_like<T>(grad, x, op, "grad");
  check_like<T>(to_x, x, op, "to_x");
  check_vector<Wide<T>>(bias, D, op, "bias");
  check_vector<Wide<T>>(to_bias, D, op, "to_bias");
  const int64_t* const key = check_seed(seed, op);
  for_rows(N, D, to_bias.data<Wide<T>>(), [&](int64_t first, int64_t last, Wide<T>* partial) {
    HUBERT_ECG_BEST(gelu_rows_backward<T>)
    (grad.data<T>(), x.data<T>(), bias.data<Wide<T>>(), first, last, D, p, key, to_x.data<T>(), partial);
  });
}

}  // namespace

void bias_gelu_cpu(Tensor x, Tensor bias, double dropout_p, Tensor seed, Tensor y) {
  of_type(x, [&](auto one) { forward<decltype(one)>(x, bias, dropout_p, seed, y); });
}

void bias_gelu_backward_cpu(Tensor grad, Tensor x, Tensor bias, double dropout_p, Tensor seed, Tensor to_x,
                            Tensor to_bias) {
  of_type(x, [&](auto one) { backward<decltype(one)>(grad, x, bias, dropout_p, seed, to_x, to_bias); });
}

}  // namespace hubert_ecg
