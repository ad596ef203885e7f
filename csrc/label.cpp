#include "label.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <vector>

#include "frame_features.h"
#include "frames.h"
#include "isa.h"
#include "kmeans_points.h"

namespace hubert_ecg {
namespace {

// Between these, a sum of squares in float32 has lost nothing to underflow or overflow.
constexpr float kLeastSquare = 1e-25f, kMostSquare = 1e35f;

// The inner loops for one instruction set: label_simd.h.
struct Kernels {
  void (*slopes)(float* x, int64_t D, int64_t to, int64_t begin, int64_t end, int64_t first, int64_t last);
  void (*copy_columns)(const float* rows, int64_t n, int64_t width, int64_t D, float* x);
  void (*unit_rows[std::size(kWidths)])(float* x, int64_t n);
};

template <class Sample>
using AsFloats = void (*)(const Sample* x, int64_t n, float scale, float* out);

#define HUBERT_ECG_SIMD_FILE "label_simd.h"
#include "every_isa.h"

// Parts of a thread's scratch, each on cache lines of its own.
class Layout {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t here = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return here;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

struct Plan {
  Plan(const Tensor& ecg, const Tensor& scale, const Tensor& centroids, const Tensor& window, const Tensor& circle,
       const Tensor& bank, const Tensor& dct, const Tensor& frame_circle, const Tensor& ends, const Tensor& labels,
       int64_t kind, int64_t start, int64_t frame_length, bool normalize)
      : isa(HUBERT_ECG_BEST(kernels)),
        kind(kind),
        num_samples(ecg.size(1)),
        num_leads(ecg.is<int16_t>() ? scale.size(1) : 1),
        scale(ecg.is<int16_t>() ? scale.data<float>() : nullptr),
        ends(ends.data<int64_t>()),
        num_ends(kind == kMfcc ? ends.size(0) : 0),
        num_frames(labels.size(1)),
        start(start),
        frame_length(frame_length),
        width(kWidths[kind]),
        normalize(normalize),
        chunks((num_frames + Codebook<float>::kPoints - 1) / Codebook<float>::kPoints),
        halo(num_ends ? 2 * kDeltaReach : 0),
        codebook(centroids.data<float>(), centroids.size(0), width) {
    if (kind != kTimeFreq) cepstra = mfcc_features(window, circle, bank, dct);
    if (kind != kMfcc) statistics = time_freq_features(frame_circle);
    const int64_t frames = Codebook<float>::kPoints + 2 * halo;
    samples_at = scratch.add<float>(ecg.is<float>() ? 0 : frames * frame_length);
    cepstra_at = scratch.add<float>(frames * cepstra.width);
    statistics_at = scratch.add<float>(frames * statistics.width);
    x_at = scratch.add<float>(frames * width);
    // Never in use at the same time.
    work_at = scratch.add<char>(std::max({cepstra.scratch_bytes, statistics.scratch_bytes,
                                          codebook.scratch_size() * static_cast<int64_t>(sizeof(float))}));
  }

  const Kernels& isa;
  int64_t kind, num_samples, num_leads;
  const float* scale;
  const int64_t* ends;
  int64_t num_ends, num_frames, start, frame_length, width;
  bool normalize;
  // Parts of a record that are labelled at a time, and the frames on either side that their slopes reach.
  int64_t chunks, halo;
  Codebook<float> codebook;
  FrameFeatures cepstra, statistics;
  Layout scratch;
  int64_t samples_at, cepstra_at, statistics_at, x_at, work_at;
};

// Samples of a record as float32, `scale` taken in lead by lead.
template <class Sample>
void convert(const Plan& plan, AsFloats<Sample> as_floats, const Sample* ecg, const float* scale, int64_t first,
             int64_t last, float* out) {
  const int64_t lead_length = plan.num_samples / plan.num_leads;
  for (int64_t i = first; i < last;) {
    const int64_t stop = std::min(last, (i / lead_length + 1) * lead_length);
    as_floats(ecg + i, stop - i, scale ? scale[i / lead_length] : 1.0f, out + (i - first));
    i = stop;
  }
}

// Columns `to` to `to` + kNumMfcc of the frames [first, last) of a record become the slopes of the columns before. x is
// where the row of frame 0 would be.
void slopes_of_leads(const Plan& plan, int64_t first, int64_t last, int64_t to, float* x) {
  int64_t begin = 0;
  for (int64_t lead = 0; lead <= plan.num_ends; ++lead) {
    const int64_t end = lead < plan.num_ends ? std::clamp(plan.ends[lead], begin, plan.num_frames) : plan.num_frames;
    plan.isa.slopes(x, plan.width, to, begin, end, std::max(begin, first), std::min(end, last));
    begin = end;
  }
}

// Labels of the frames [first, last) of one record.
template <class Sample>
void label_frames(const Plan& plan, AsFloats<Sample> as_floats, const Sample* ecg, const float* scale, int64_t first,
                  int64_t last, char* scratch, int64_t* labels) {
  const auto part = [&](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
  void* const work = scratch + plan.work_at;
  const int64_t n = last - first, S = plan.frame_length;
  const int64_t from = std::max<int64_t>(0, first - plan.halo), to = std::min(plan.num_frames, last + plan.halo);
  const float* frames;
  if constexpr (std::is_same_v<Sample, float>) {
    frames = ecg + plan.start + from * S;
  } else {
    convert(plan, as_floats, ecg, scale, plan.start + from * S, plan.start + to * S, part(plan.samples_at));
    frames = part(plan.samples_at);
  }

  // Rows of the frames [from, to).
  float* const x = part(plan.x_at);
  if (plan.statistics.width) {
    plan.statistics.run(frames, n, work, part(plan.statistics_at));
    plan.isa.copy_columns(part(plan.statistics_at), n, plan.statistics.width, plan.width, x);
  }
  if (plan.cepstra.width) {
    plan.cepstra.run(frames, to - from, work, part(plan.cepstra_at));
    plan.isa.copy_columns(part(plan.cepstra_at), to - from, kNumMfcc, plan.width, x + plan.statistics.width);
  }
  if (plan.num_ends) {
    const int64_t before = std::max(from, first - kDeltaReach), after = std::min(to, last + kDeltaReach);
    slopes_of_leads(plan, before, after, kNumMfcc, x - from * plan.width);
    slopes_of_leads(plan, first, last, 2 * kNumMfcc, x - from * plan.width);
  } else if (plan.kind == kMfcc) {
    for (int64_t i = 0; i < n; ++i) std::fill_n(x + i * plan.width + kNumMfcc, 2 * kNumMfcc, 0.0f);
  }
  float* const rows = x + (first - from) * plan.width;
  if (plan.normalize) plan.isa.unit_rows[plan.kind](rows, n);
  plan.codebook.label(rows, n, labels, static_cast<float*>(work));
}

template <class Sample>
void run(const Plan& plan, const Tensor& ecg, const Tensor& labels) {
  const int64_t B = ecg.size(0), N = plan.num_frames, units = B * plan.chunks;
  // A thread costs as much as some frames.
  const int num_threads =
      static_cast<int>(std::clamp<int64_t>(B * N / 64, 1, std::min<int64_t>(units, omp_get_max_threads())));
  const int64_t lines = plan.scratch.bytes() / 64;
  const AsFloats<Sample> convert_samples = HUBERT_ECG_BEST(as_floats<Sample>);
  std::vector<CacheLine> scratch(num_threads * lines);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t b = unit / plan.chunks, chunk = unit % plan.chunks;
    const int64_t first = N * chunk / plan.chunks, last = N * (chunk + 1) / plan.chunks;
    label_frames(plan, convert_samples, ecg.data<Sample>() + b * plan.num_samples,
                 plan.scale ? plan.scale + b * plan.num_leads : nullptr, first, last,
                 scratch[omp_get_thread_num() * lines].bytes, labels.data<int64_t>() + b * N + first);
  }
}

}  // namespace

void frame_assign_cpu(Tensor ecg, Tensor scale, Tensor centroids, Tensor window, Tensor circle, Tensor bank, Tensor dct,
                      Tensor frame_circle, Tensor ends, Tensor labels, int64_t kind, int64_t start,
                      int64_t frame_length, bool normalize) {
  check_frame_assign(ecg, scale, centroids, window, circle, bank, dct, frame_circle, ends, labels, kind, start,
                     frame_length);
  if (ecg.size(0) == 0 || labels.size(1) == 0) return;
  const Plan plan(ecg, scale, centroids, window, circle, bank, dct, frame_circle, ends, labels, kind, start,
                  frame_length, normalize);
  if (ecg.is<float>()) return run<float>(plan, ecg, labels);
  if (ecg.is<double>()) return run<double>(plan, ecg, labels);
  if (ecg.is<Float16>()) return run<Float16>(plan, ecg, labels);
  if (ecg.is<BFloat16>()) return run<BFloat16>(plan, ecg, labels);
  run<int16_t>(plan, ecg, labels);
}

}  // namespace hubert_ecg
