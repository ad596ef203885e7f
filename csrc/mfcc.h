#pragma once
#include "tensor.h"

namespace hubert_ecg {

// Mel-frequency cepstral coefficients as Kaldi defines them, of each row of `frames`.
//   frames [F, S] float or double; tables, all double: window [S], circle [N, 2]: cos and sin of 2 pi j / N with N the
//   power of two that holds S, bank [M, N / 2]: mel filters over the FFT bins, dct [M, C]: cosine transform and lifter;
//   out [F, C] of the type of frames (written)
void mfcc_cpu(Tensor frames, Tensor window, Tensor circle, Tensor bank, Tensor dct, Tensor out);
void mfcc_cuda(Tensor frames, Tensor window, Tensor circle, Tensor bank, Tensor dct, Tensor out, intptr_t stream);

constexpr double kPreemphasis = 0.97;
// Kaldi floors mel energies at the epsilon of float, whatever the type.
constexpr double kEnergyFloor = 1.1920928955078125e-07;

// A mel filter whose energy is below this share of the frame's has lost digits in a float32 transform, whose every bin
// is off by about FLT_EPSILON of the whole: coefficients then miss Kaldi's by more than 1e-3. Such a frame, as smooth
// as an ECG often is, is computed again in float64.
constexpr double kTrusted = 3e-5;
// Above this energy, squares overflow in float32.
constexpr double kMostEnergy = 1e30;

template <class T>
bool is_matrix(const Tensor& x, int64_t rows, int64_t columns) {
  return x.is<T>() && x.contiguous() && x.ndim() == 2 && x.size(0) == rows && x.size(1) == columns;
}

// For frames of S samples.
inline void check_mfcc_tables(int64_t S, const Tensor& window, const Tensor& circle, const Tensor& bank,
                              const Tensor& dct) {
  int64_t N = 2;
  while (N < S) N *= 2;
  HUBERT_ECG_CHECK(window.is<double>() && window.contiguous() && window.ndim() == 1 && window.size(0) == S,
                   "mfcc: window must be float64 [", S, "], got ", window);
  HUBERT_ECG_CHECK(is_matrix<double>(circle, N, 2), "mfcc: circle must be float64 [", N, ", 2], got ", circle);
  HUBERT_ECG_CHECK(bank.ndim() == 2 && is_matrix<double>(bank, bank.size(0), N / 2), "mfcc: bank must be float64 [M, ",
                   N / 2, "], got ", bank);
  HUBERT_ECG_CHECK(dct.ndim() == 2 && is_matrix<double>(dct, bank.size(0), dct.size(1)), "mfcc: dct must be float64 [",
                   bank.size(0), ", C], got ", dct);
}

template <class T>
void check_mfcc(const Tensor& frames, const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct,
                const Tensor& out) {
  HUBERT_ECG_CHECK(frames.is<T>() && frames.contiguous() && frames.ndim() == 2 && frames.size(1) >= 2,
                   "mfcc: frames must be contiguous [F, S >= 2], got ", frames);
  check_mfcc_tables(frames.size(1), window, circle, bank, dct);
  HUBERT_ECG_CHECK(is_matrix<T>(out, frames.size(0), dct.size(1)), "mfcc: out must be [", frames.size(0), ", ",
                   dct.size(1), "] of the type of frames, got ", out);
}

}  // namespace hubert_ecg
