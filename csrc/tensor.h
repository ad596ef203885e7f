// A borrowed view of a tensor, read from a DLPack capsule. Owns nothing; valid for one call.
#pragma once
#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <type_traits>

namespace hubert_ecg {

// The part of the DLPack 0.x ABI (github.com/dmlc/dlpack) that is read here.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// Sixteen bits of a number that the processor may have no type for.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What kernels compute numbers of this type in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const DLTensor* view) : view_(view) {}

  int ndim() const { return view_->ndim; }
  int64_t size(int dim) const { return view_->shape[dim < 0 ? view_->ndim + dim : dim]; }
  int64_t stride(int dim) const {
    dim = dim < 0 ? view_->ndim + dim : dim;
    if (view_->strides) return view_->strides[dim];
    int64_t numbers = 1;
    while (++dim < view_->ndim) numbers *= view_->shape[dim];
    return numbers;
  }
  bool contiguous() const {
    if (!view_->strides) return true;
    for (int dim = 0; dim < view_->ndim; ++dim)
      if (view_->shape[dim] == 0) return true;
    int64_t want = 1;
    for (int dim = view_->ndim - 1; dim >= 0; --dim) {
      if (view_->shape[dim] != 1 && view_->strides[dim] != want) return false;
      want *= view_->shape[dim];
    }
    return true;
  }
  template <class T>
  bool is() const;
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_->data) + view_->byte_offset);
  }

  // Prints as in "float32[4, 8]".
  friend std::ostream& operator<<(std::ostream& out, const Tensor& x) {
    static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    out << (x.view_->code < 7 ? kinds[x.view_->code] : "unknown") << int(x.view_->bits) << '[';
    for (int dim = 0; dim < x.ndim(); ++dim) out << (dim ? ", " : "") << x.size(dim);
    return out << ']' << (x.contiguous() ? "" : " (not contiguous)");
  }

 private:
  template <uint8_t code, class T>
  bool matches() const {
    return view_->code == code && view_->bits == 8 * sizeof(T) && view_->lanes == 1;
  }
  const DLTensor* view_ = nullptr;
};

template <>
inline bool Tensor::is<float>() const {
  return matches<2, float>();
}
template <>
inline bool Tensor::is<double>() const {
  return matches<2, double>();
}
template <>
inline bool Tensor::is<int64_t>() const {
  return matches<0, int64_t>();
}
template <>
inline bool Tensor::is<int16_t>() const {
  return matches<0, int16_t>();
}
template <>
inline bool Tensor::is<Float16>() const {
  return matches<2, Float16>();
}
template <>
inline bool Tensor::is<BFloat16>() const {
  return matches<4, BFloat16>();
}

// work(T()) for the floating T of x; float where it has none, which the checks of `work` then refuse. CUDA has types of
// its own for half precision.
template <class Half = Float16, class BHalf = BFloat16, class Work>
void of_type(const Tensor& x, const Work& work) {
  if (x.is<double>()) return work(double());
  if (x.is<Half>()) return work(Half());
  if (x.is<BHalf>()) return work(BHalf());
  work(float());
}

// Reaches Python as ValueError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

#define HUBERT_ECG_CHECK(condition, ...)               \
  do {                                                 \
    if (!(condition)) ::hubert_ecg::fail(__VA_ARGS__); \
  } while (0)

}  // namespace hubert_ecg
