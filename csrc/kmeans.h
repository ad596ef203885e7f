#pragma once
#include "tensor.h"

namespace hubert_ecg {

// labels[i] = argmin_k |x[i] - centroids[k]|^2 in float64 arithmetic, the lowest k on a tie. A distance that is NaN
// never wins; where none wins, the label is 0.
//   x [N, D] and centroids [K, D], both float32 or both float64; labels [N] int64 (written)
void kmeans_assign_cpu(Tensor x, Tensor centroids, Tensor labels);
void kmeans_assign_cuda(Tensor x, Tensor centroids, Tensor labels, intptr_t stream);

// sums[k] = sum of x[i] over the i with labels[i] = k, counts[k] = how many they are. A label outside 0..K-1 is left
// out. The points are cut into P equal chunks whose sums are added in order: the result depends on P, not on the
// threads.
//   x [N, D] float32 or float64; labels [N] int64; sums [K, D] float64 and counts [K] int64 (written);
//   partial_sums [P, K, D] float64 and partial_counts [P, K] int64 (scratch)
void kmeans_accumulate_cpu(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                           Tensor partial_counts);
void kmeans_accumulate_cuda(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                            Tensor partial_counts, intptr_t stream);

// Both in one pass over the points: labels as of kmeans_assign, their sums and counts as of kmeans_accumulate, and the
// sum of |x[i] - centroids[labels[i]]|^2, which is 0 unless it is asked for.
//   inertia [] float64 (written); the others as above. On the CPU, P = 1 shares the clusters among the threads.
void kmeans_step_cpu(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia,
                     Tensor partial_sums, Tensor partial_counts, bool with_inertia);
void kmeans_step_cuda(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia,
                      Tensor partial_sums, Tensor partial_counts, bool with_inertia, intptr_t stream);

inline bool is_points(Tensor x) { return x.ndim() == 2 && (x.is<float>() || x.is<double>()) && x.contiguous(); }

inline void check_kmeans_assign(Tensor x, Tensor centroids, Tensor labels, const char* op = "kmeans_assign") {
  HUBERT_ECG_CHECK(is_points(x), op, ": x must be a contiguous float32 or float64 [N, D], got ", x);
  HUBERT_ECG_CHECK(is_points(centroids) && centroids.is<float>() == x.is<float>() && centroids.size(0) > 0 &&
                       centroids.size(1) == x.size(1),
                   op, ": centroids must be a contiguous [K, D] with K > 0 and the D and dtype of x (", x, "), got ",
                   centroids);
  HUBERT_ECG_CHECK(labels.ndim() == 1 && labels.is<int64_t>() && labels.contiguous() && labels.size(0) == x.size(0), op,
                   ": labels must be int64 [", x.size(0), "], got ", labels);
}

inline void check_kmeans_accumulate(Tensor x, Tensor labels, Tensor sums, Tensor counts, Tensor partial_sums,
                                    Tensor partial_counts, const char* op = "kmeans_accumulate") {
  HUBERT_ECG_CHECK(is_points(x), op, ": x must be a contiguous float32 or float64 [N, D], got ", x);
  HUBERT_ECG_CHECK(labels.ndim() == 1 && labels.is<int64_t>() && labels.contiguous() && labels.size(0) == x.size(0), op,
                   ": labels must be a contiguous int64 [", x.size(0), "], got ", labels);
  HUBERT_ECG_CHECK(sums.ndim() == 2 && sums.is<double>() && sums.contiguous() && sums.size(1) == x.size(1), op,
                   ": sums must be float64 [K, ", x.size(1), "], got ", sums);
  HUBERT_ECG_CHECK(counts.ndim() == 1 && counts.is<int64_t>() && counts.contiguous() && counts.size(0) == sums.size(0),
                   op, ": counts must be int64 [", sums.size(0), "], got ", counts);
  HUBERT_ECG_CHECK(
      partial_sums.ndim() == 3 && partial_sums.is<double>() && partial_sums.contiguous() && partial_sums.size(0) > 0 &&
          partial_sums.size(1) == sums.size(0) && partial_sums.size(2) == sums.size(1),
      op, ": partial_sums must be float64 [P, ", sums.size(0), ", ", sums.size(1), "], got ", partial_sums);
  HUBERT_ECG_CHECK(partial_counts.ndim() == 2 && partial_counts.is<int64_t>() && partial_counts.contiguous() &&
                       partial_counts.size(0) == partial_sums.size(0) && partial_counts.size(1) == sums.size(0),
                   op, ": partial_counts must be int64 [", partial_sums.size(0), ", ", sums.size(0), "], got ",
                   partial_counts);
}

inline void check_kmeans_step(Tensor x, Tensor centroids, Tensor labels, Tensor sums, Tensor counts, Tensor inertia,
                              Tensor partial_sums, Tensor partial_counts) {
  check_kmeans_assign(x, centroids, labels, "kmeans_step");
  check_kmeans_accumulate(x, labels, sums, counts, partial_sums, partial_counts, "kmeans_step");
  HUBERT_ECG_CHECK(sums.size(0) == centroids.size(0), "kmeans_step: sums must be float64 [", centroids.size(0), ", ",
                   x.size(1), "], got ", sums);
  HUBERT_ECG_CHECK(inertia.ndim() == 0 && inertia.is<double>(), "kmeans_step: inertia must be float64 [], got ",
                   inertia);
}

}  // namespace hubert_ecg
