// The 16-bit types of CUDA and the tensor-core products of nvcuda::wmma, for cuda_on_host.h.
#pragma once

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even; NaN stays NaN.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                : exponent     ? std::ldexp(float(mantissa | 1024), exponent - 25)
                               : std::ldexp(float(mantissa), -24);
  return v.bits >> 15 ? -value : value;
}

// To the nearest, ties to even; NaN stays NaN.
inline __half __float2half_rn(float value) {
  const float size = std::abs(value);
  const unsigned sign = std::signbit(value) ? 0x8000u : 0;
  if (size != size) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = -13;
  if (size >= 0x1p-14f) std::frexp(size, &exponent);
  // The leading one of a normal number counts as one more of its exponent.
  const unsigned mantissa = unsigned(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return {uint16_t(sign | ((unsigned(exponent + 13) << 10) + mantissa))};
}

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

// A lane's share of a 16 x 16 tile: eight elements, in an order that no kernel may rely on.
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  static constexpr int num_elements = 8;
  T x[num_elements];
  static int row(int lane, int i) { return (lane * 5 + i * 2) % 16; }
  static int column(int lane, int i) { return (i * 2 + lane / 16 + row(lane, i)) % 16; }
};

template <class Use, class T, class Layout>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& to, T value) {
  for (T& x : to.x) x = value;
}

namespace host {

inline void check_tile(const void* at, unsigned pitch, size_t element) {
  auto& b = ::hubert_ecg::host::block();
  if (reinterpret_cast<uintptr_t>(at) % 32) b.fail("a tile of a tensor-core product does not begin at a multiple of 32 bytes");
  if (pitch * element % 16) b.fail("the rows of a tile of a tensor-core product are not multiples of 16 bytes apart");
}

// What every lane of the warp passes; barriers on both sides, because all lanes take part.
template <class T, class Work>
void together(T* mine, const Work& work) {
  auto& b = ::hubert_ecg::host::block();
  b.slots[b.fiber->number] = reinterpret_cast<uint64_t>(mine);
  b.sync_warp(0xffffffffu);
  work(reinterpret_cast<T* const*>(&b.slots[b.fiber->number / 32 * 32]));
  b.sync_warp(0xffffffffu);
}

inline double number(__half x) { return __half2float(x); }
inline double number(__nv_bfloat16 x) { return __bfloat162float(x); }

inline float toward_zero(double value) {
  const float nearest = float(value);
  return std::abs(double(nearest)) > std::abs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace host

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned pitch) {
  constexpr bool by_rows = std::is_same<Layout, row_major>::value;
  host::check_tile(from, pitch, sizeof(T));
  host::together(&to, [&](auto) {
    const int lane = ::hubert_ecg::host::lane();
    for (int i = 0; i < 8; ++i) {
      const int row = to.row(lane, i), column = to.column(lane, i);
      to.x[i] = by_rows ? from[row * pitch + column] : from[column * pitch + row];
    }
  });
}

template <class T>
void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& from, unsigned pitch, layout_t layout) {
  host::check_tile(to, pitch, sizeof(T));
  host::together(&from, [&](auto) {
    const int lane = ::hubert_ecg::host::lane();
    for (int i = 0; i < 8; ++i) {
      const int row = from.row(lane, i), column = from.column(lane, i);
      (layout == mem_row_major ? to[row * pitch + column] : to[column * pitch + row]) = from.x[i];
    }
  });
}

// Exact products of 16-bit numbers; sums of eight and what there was are rounded towards zero, as the hardware does at worst.
template <class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c) {
  struct Operands {
    decltype(&a) left;
    decltype(&b) right;
    decltype(&c) before;
    decltype(&d) after;
  } mine{&a, &b, &c, &d};
  // One lane computes for all.
  host::together(&mine, [&](Operands* const* lanes) {
    if (::hubert_ecg::host::lane() != 0) return;
    double left[16][16], right[16][16];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        left[a.row(lane, i)][a.column(lane, i)] = host::number(lanes[lane]->left->x[i]);
        right[b.column(lane, i)][b.row(lane, i)] = host::number(lanes[lane]->right->x[i]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const double *const row = left[c.row(lane, i)], *const column = right[c.column(lane, i)];
        float sum = lanes[lane]->before->x[i];
        for (int k = 0; k < 16; k += 8) {
          double exact = sum;
          for (int j = k; j < k + 8; ++j) exact += row[j] * column[j];
          sum = host::toward_zero(exact);
        }
        lanes[lane]->after->x[i] = sum;
      }
    }
  });
}

}  // namespace nvcuda::wmma
