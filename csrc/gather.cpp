#include "gather.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "isa.h"

namespace hubert_ecg {
namespace {

#define HUBERT_ECG_SIMD_FILE "gather_simd.h"
#include "every_isa.h"

// Both kinds of samples have sixteen bits.
constexpr int64_t kSampleBytes = 2;
// The system maps the neighbours of a page with it.
constexpr int64_t kAroundBytes = 64 << 10;
// What is mapped counts as the memory of the process, though the system could take it back: it is given back after so
// many bytes.
constexpr int64_t kResidentBytes = 512 << 20;

template <class T>
void copy(const T* record, int64_t length, int64_t start, const float* scale, int64_t num_leads, int64_t num_samples,
          float* out) {
  const int64_t count = std::min(num_samples, length - start);
  for (int64_t l = 0; l < num_leads; ++l, out += num_samples) {
    HUBERT_ECG_BEST(scaled<T>)(record + l * length + start, count, scale[l], out);
    std::fill(out + count, out + num_samples, 0.f);
  }
}

const int64_t* column(const Tensor& x, int64_t size, const char* name) {
  HUBERT_ECG_CHECK(x.is<int64_t>() && x.contiguous() && x.ndim() == 1 && x.size(0) == size, "gather: ", name,
                   " must be contiguous int64 [", size, "], got ", x);
  return x.data<int64_t>();
}

[[noreturn]] void refuse(int error, const std::string& path) {
  throw std::system_error(error, std::generic_category(), path);
}

// Closes what it holds, also where an error is thrown.
struct File {
  int handle;
  ~File() {
    if (handle >= 0) close(handle);
  }
};

}  // namespace

Shards::Shards(const std::vector<std::string>& paths, const std::vector<int64_t>& sizes, bool half) : half_(half) {
  HUBERT_ECG_CHECK(paths.size() == sizes.size(), "Shards: there must be a size for each path");
  maps_.reserve(paths.size());
  try {
    for (size_t i = 0; i < paths.size(); ++i) {
      const int64_t bytes = kSampleBytes * sizes[i];
      const File file{open(paths[i].c_str(), O_RDONLY | O_CLOEXEC)};
      struct stat facts;
      if (file.handle < 0 || fstat(file.handle, &facts)) refuse(errno, paths[i]);
      HUBERT_ECG_CHECK(sizes[i] >= 0 && facts.st_size == bytes, "Shards: ", paths[i], " must have ", bytes,
                       " bytes, got ", int64_t(facts.st_size));
      // No map is empty.
      void* const data = bytes ? mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.handle, 0) : nullptr;
      if (data == MAP_FAILED) refuse(errno, paths[i]);
      maps_.push_back({data, sizes[i]});
      num_bytes_ += bytes;
    }
  } catch (...) {
    unmap();
    throw;
  }
}

void Shards::unmap() {
  for (const Map& map : maps_)
    if (map.size) munmap(map.data, kSampleBytes * map.size);
}

void Shards::gather(Tensor shard, Tensor offset, Tensor length, Tensor start, Tensor scale, Tensor out,
                    int num_threads) {
  HUBERT_ECG_CHECK(out.is<float>() && out.contiguous() && out.ndim() == 3,
                   "gather: out must be contiguous float32 [B, L, T], got ", out);
  const int64_t B = out.size(0), L = out.size(1), T = out.size(2);
  HUBERT_ECG_CHECK(
      scale.is<float>() && scale.contiguous() && scale.ndim() == 2 && scale.size(0) == B && scale.size(1) == L && L > 0,
      "gather: scale must be contiguous float32 [", B, ", ", L, "], got ", scale);
  const int64_t *const shards = column(shard, B, "shard"), *const offsets = column(offset, B, "offset");
  const int64_t *const lengths = column(length, B, "length"), *const starts = column(start, B, "start");
  const int64_t num_shards = maps_.size();
  int64_t touched = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t s = shards[b], samples = s >= 0 && s < num_shards ? maps_[s].size : -1;
    // Ordered so that nothing overflows.
    HUBERT_ECG_CHECK(
        offsets[b] >= 0 && offsets[b] <= samples && lengths[b] >= 0 && lengths[b] <= (samples - offsets[b]) / L,
        "gather: record ", b, " must lie within its shard, got shard ", s, " of ", num_shards, ", offset ", offsets[b],
        " and length ", lengths[b]);
    HUBERT_ECG_CHECK(starts[b] >= 0 && starts[b] <= lengths[b], "gather: start of record ", b, " must be 0 to ",
                     lengths[b], ", got ", starts[b]);
    touched += kSampleBytes * L * lengths[b] + kAroundBytes;
  }
  const float* const scales = scale.data<float>();
  float* const to = out.data<float>();
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
  for (int64_t b = 0; b < B; ++b) {
    const char* const record = static_cast<const char*>(maps_[shards[b]].data) + kSampleBytes * offsets[b];
    const auto copy_to = [&](auto* samples) {
      copy(samples, lengths[b], starts[b], scales + b * L, L, T, to + b * L * T);
    };
    if (half_)
      copy_to(reinterpret_cast<const Float16*>(record));
    else
      copy_to(reinterpret_cast<const int16_t*>(record));
  }
  if (num_bytes_ > kResidentBytes) forget_after(touched);
}

void Shards::forget_after(int64_t bytes) {
  if (touched_.fetch_add(bytes) + bytes < kResidentBytes) return;
  touched_ = 0;
  // Another thread may be reading: what it looks at is mapped again.
  for (const Map& map : maps_)
    if (map.size) madvise(map.data, kSampleBytes * map.size, MADV_DONTNEED);
}

}  // namespace hubert_ecg
