#pragma once
#include "tensor.h"

namespace hubert_ecg {

// A ring on which a product with |H|^2 is scipy.signal.filtfilt of `memory + 1` taps: each lead of x less its lowest
// sample and divided by its extent, from the lowest sample to the highest, what follows it (oddly mirrored), its first
// sample as often as there is room, and what comes before it. Of a lead with a sample that is not finite, the extent
// is NaN and the ring 0.
//   x [L, n] float32 or float64, n > memory; ring (written) [L, >= n + 2 memory], low, extent (written) [L] float64
void published_ring_cpu(Tensor x, int64_t memory, Tensor ring, Tensor low, Tensor extent);

// out[l, t] = 2 (y[l, t] - min(y[l])) / (max(y[l]) - min(y[l]) + 1e-8 / extent[l]) - 1.
//   y [L, n] float32, rows of any stride; extent [L] float64; out (written) [L, <= n] float32
void published_scale_cpu(Tensor y, Tensor extent, Tensor out);

}  // namespace hubert_ecg
