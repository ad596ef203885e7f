#pragma once
#include "mfcc.h"
#include "time_freq.h"

namespace hubert_ecg {

// labels[b, t] = the centroid nearest to the features of frame t of record b, ecg[b, start + t S :][: S]: features of
// `kind`, with `normalize` of length 1, compared as by kmeans_assign. Nothing is stored in between but the features of
// some frames in a thread's scratch. Features that are not finite give label 0.
//   ecg [B, n] float32, float64, float16, bfloat16, or int16 with scale [B, L] float32, L leads of n / L samples, else
//   [0]:
//     a sample is float(ecg) * scale, rounded to float32 before anything else;
//   centroids [K, D] float32, D = kWidths[kind];
//   window [S], circle [N, 2], bank [M, N / 2] and dct [M, 13], float64, as in mfcc.h; [0] for time_freq;
//   frame_circle [S, 2] float64: cos and sin of 2 pi j / S; [0] for mfcc;
//   ends [L'] int64: where each lead ends among the frames, the last at num_frames, for the slopes of mfcc, which are
//     those of deltas.h with a window of 5; [0]: slopes are 0;
//   labels [B, num_frames] int64 (written)
void frame_assign_cpu(Tensor ecg, Tensor scale, Tensor centroids, Tensor window, Tensor circle, Tensor bank, Tensor dct,
                      Tensor frame_circle, Tensor ends, Tensor labels, int64_t kind, int64_t start,
                      int64_t frame_length, bool normalize);
void frame_assign_cuda(Tensor ecg, Tensor scale, Tensor centroids, Tensor window, Tensor circle, Tensor bank,
                       Tensor dct, Tensor frame_circle, Tensor ends, Tensor labels, int64_t kind, int64_t start,
                       int64_t frame_length, bool normalize, intptr_t stream);

enum FeatureKind : int64_t { kMfcc, kTimeFreq, kMixed };
constexpr int64_t kNumMfcc = 13;
constexpr int64_t kWidths[] = {3 * kNumMfcc, kTimeFreqFeatures, kTimeFreqFeatures + kNumMfcc};
constexpr int64_t kDeltaReach = 2;

inline void check_frame_assign(const Tensor& ecg, const Tensor& scale, const Tensor& centroids, const Tensor& window,
                               const Tensor& circle, const Tensor& bank, const Tensor& dct, const Tensor& frame_circle,
                               const Tensor& ends, const Tensor& labels, int64_t kind, int64_t start,
                               int64_t frame_length) {
  HUBERT_ECG_CHECK(
      ecg.ndim() == 2 && ecg.contiguous() &&
          (ecg.is<float>() || ecg.is<double>() || ecg.is<Float16>() || ecg.is<BFloat16>() || ecg.is<int16_t>()),
      "frame_assign: ecg must be a contiguous floating or int16 [B, n], got ", ecg);
  const int64_t B = ecg.size(0), n = ecg.size(1), S = frame_length;
  HUBERT_ECG_CHECK(
      scale.is<float>() && scale.contiguous() &&
          (ecg.is<int16_t>() ? scale.ndim() == 2 && scale.size(0) == B && scale.size(1) > 0 && n % scale.size(1) == 0
                             : scale.ndim() == 1 && scale.size(0) == 0),
      "frame_assign: scale must be float32 [", B, ", L] for int16 and [0] else, got ", scale);
  HUBERT_ECG_CHECK(kind >= kMfcc && kind <= kMixed, "frame_assign: kind must be 0, 1 or 2, got ", kind);
  HUBERT_ECG_CHECK(
      centroids.ndim() == 2 && centroids.size(0) > 0 && is_matrix<float>(centroids, centroids.size(0), kWidths[kind]),
      "frame_assign: centroids must be float32 [K > 0, ", kWidths[kind], "], got ", centroids);
  HUBERT_ECG_CHECK(labels.is<int64_t>() && labels.contiguous() && labels.ndim() == 2 && labels.size(0) == B,
                   "frame_assign: labels must be int64 [", B, ", num_frames], got ", labels);
  const int64_t num_frames = labels.size(1);
  HUBERT_ECG_CHECK(S >= 2 && start >= 0 && start <= n && num_frames <= (n - start) / S,
                   "frame_assign: frames must lie in the ", n, " samples of a record, got ", start, " + ", num_frames,
                   " x ", S);
  if (kind != kTimeFreq) {
    check_mfcc_tables(S, window, circle, bank, dct);
    HUBERT_ECG_CHECK(dct.size(1) == kNumMfcc, "frame_assign: dct must be [M, 13], got ", dct);
  }
  HUBERT_ECG_CHECK(kind == kMfcc || is_matrix<double>(frame_circle, S, 2),
                   "frame_assign: frame_circle must be float64 [", S, ", 2], got ", frame_circle);
  HUBERT_ECG_CHECK(ends.is<int64_t>() && ends.contiguous() && ends.ndim() == 1,
                   "frame_assign: ends must be int64 [L], got ", ends);
}

}  // namespace hubert_ecg
