// Up to 128 tokens, heads of up to 128 numbers and float32 at most: a block takes a head of a record with all of its
// valid keys and values in shared memory, its warps 16 queries (forward) or 16 keys (backward) each. All else, and what
// finds no room, goes through the plain kernels of attention_rows.cuh.
#include <cmath>

#include "attention_rows.cuh"

namespace hubert_ecg {
namespace {

constexpr int kMostTokens = 128, kMostDim = 128;
constexpr int kRows = 32;  // queries of a block at a time, in the backward

// What a block has in shared memory, in bytes from its start. All parts begin at multiples of 32 bytes.
template <class T>
struct Room {
  int tokens, depth, pitch, weights_pitch;  // padded to tiles, and numbers from row to row
  int keys, values, rest;                   // after kMostTokens ints and 8 words

  HUBERT_ECG_ANYWHERE Room(int64_t num_tokens, int64_t dim) {
    // A row begins at its own bank, or, of 16-bit numbers, at a multiple of 16 bytes.
    constexpr int kApart = sizeof(T) == 2 ? 8 : 1;
    tokens = int(num_tokens + 15) / 16 * 16;
    depth = int(dim + 15) / 16 * 16;
    pitch = depth + kApart;
    weights_pitch = tokens + kApart;
    keys = (kMostTokens + 8) * int(sizeof(int));
    values = keys + tokens * pitch * int(sizeof(T));
    rest = values + tokens * pitch * int(sizeof(T));
  }
  // Of a warp in the forward: 16 queries, and their scores, whose rows become weights.
  HUBERT_ECG_ANYWHERE int scores_pitch() const { return tokens + 4; }
  HUBERT_ECG_ANYWHERE int of_warp() const {
    return 16 * (pitch * int(sizeof(T)) + scores_pitch() * int(sizeof(float)));
  }
  HUBERT_ECG_ANYWHERE int forward(int warps) const { return rest + warps * of_warp(); }

  // In the backward: queries and gradients, weights and gradients of scores, what rows are, a tile for each warp, and
  // sums of rows for each token.
  HUBERT_ECG_ANYWHERE int rows() const { return kRows * pitch * int(sizeof(T)); }
  HUBERT_ECG_ANYWHERE int weights() const { return kRows * weights_pitch * int(sizeof(T)); }
  HUBERT_ECG_ANYWHERE int tiles() const { return rest + 2 * rows() + 2 * weights() + 3 * kRows * int(sizeof(float)); }
  HUBERT_ECG_ANYWHERE int sums() const { return tiles() + tokens * kRoomPitch * int(sizeof(float)); }
  HUBERT_ECG_ANYWHERE int backward(bool some) const {
    return sums() + (some ? tokens * depth * int(sizeof(float)) : 0);
  }
};

// The valid keys of a record, in their order, by all threads of a block; returns how many. words [kMostTokens / 32] has
// a bit for each token in a span. A barrier ends it.
template <class T>
__device__ int list_keys(const Inputs<T>& in, int64_t b, int* keys, unsigned* words) {
  const int lane = threadIdx.x % 32, tokens = int(in.tokens);
  for (int word = threadIdx.x / 32; word < kMostTokens / 32; word += blockDim.x / 32) {
    const int t = 32 * word + lane;
    const bool valid = t < tokens && (!in.spans || in_a_span(in.spans + b * in.S * 2, in.S, t));
    const unsigned found = __ballot_sync(kAllLanes, valid);
    if (lane == 0) words[word] = found;
  }
  __syncthreads();
  int count = 0;
  for (int word = 0; word < kMostTokens / 32; ++word) count += __popc(words[word]);
  for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
    int before = __popc(words[t / 32] & ((1u << t % 32) - 1));
    for (int word = 0; word < t / 32; ++word) before += __popc(words[word]);
    if (count == 0)
      keys[t] = t;
    else if (words[t / 32] >> t % 32 & 1)
      keys[before] = t;
  }
  __syncthreads();
  return count == 0 ? tokens : count;
}

// The result for all queries of a head, 16 to a warp at a time. kTiles: of D, at most.
template <class T, int kTiles>
__global__ void __launch_bounds__(2 * kMostTokens) attention_kernel(Inputs<T> in, Heads<T> out, Drop drop, bool wide) {
  HUBERT_ECG_SHARED(unsigned char, raw);
  const Room<T> room(in.tokens, in.D);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, D = int(in.D);
  const int64_t b = blockIdx.x / in.H, h = blockIdx.x % in.H;
  int* const list = reinterpret_cast<int*>(raw);
  T *const keys = reinterpret_cast<T*>(raw + room.keys), *const values = reinterpret_cast<T*>(raw + room.values),
           *const mine = reinterpret_cast<T*>(raw + room.rest + warp * room.of_warp());
  float* const scores = reinterpret_cast<float*>(mine + 16 * room.pitch);
  T* const weights = reinterpret_cast<T*>(scores);
  const int pitch = room.pitch, scores_pitch = room.scores_pitch(),
            weights_pitch = scores_pitch * int(sizeof(float) / sizeof(T));

  const int n = list_keys<T>(in, b, list, reinterpret_cast<unsigned*>(list + kMostTokens)), steps = (n + 15) / 16;
  const auto key = [&](int row) { return int64_t(row < n ? list[row] : -1); };
  load_rows(in.k, b, h, 16 * steps, D, room.depth, wide, threadIdx.x, blockDim.x, key, keys, pitch);
  load_rows(in.v, b, h, 16 * steps, D, room.depth, wide, threadIdx.x, blockDim.x, key, values, pitch);
  __syncthreads();
  const Keep keep(in.seed, drop);
  for (int64_t first = 16 * warp; first < in.M; first += 16 * warps) {
    const auto query = [&](int row) { return token_of(in, b, first + row); };
    load_rows(in.q, b, h, 16, D, room.depth, wide, lane, 32, query, mine, pitch);
    __syncwarp();
    for (int j = 0; j < steps; j += 4) {
      Tile<T> sums[4];
      clear(sums);
      add_products<false, true>(mine, pitch, keys + j * 16 * pitch, pitch, room.depth / 16, steps - j, sums);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j + i < steps) store_tile(sums[i], scores + (j + i) * 16, scores_pitch);
    }
    __syncwarp();
    // Of row r, in lane r: what its sum is multiplied by.
    float factor = 0;
    for (int r = 0; r < 16 && first + r < in.M; ++r) {
      const int64_t row = (b * in.H + h) * in.M + first + r;
      float weight[kMostTokens / 32], most = -INFINITY, sum = 0;
#pragma unroll
      for (int i = 0; i < kMostTokens / 32; ++i) {
        const int c = lane + 32 * i;
        weight[i] = c < n ? in.scale * scores[r * scores_pitch + c] : -INFINITY;
        most = weight[i] > most ? weight[i] : most;
      }
      most = most_of_warp(most);
#pragma unroll
      for (int i = 0; i < kMostTokens / 32; ++i) sum += weight[i] = std::exp(weight[i] - most);
      sum = sum_of_warp(sum);
      const bool outside = query(r) < 0;
      if (lane == 0) in.logsumexp[row] = outside ? INFINITY : most + std::log(sum);
      if (lane == r) factor = outside ? 0.0f : float(drop.scale) / sum;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kMostTokens / 32; ++i) {
        const int c = lane + 32 * i;
        if (c >= 16 * steps) continue;
        const bool kept = c < n && keep(row * in.tokens + list[c]);
        narrow(kept ? weight[i] : 0.0f, weights[r * weights_pitch + c]);
      }
    }
    __syncwarp();
    Tile<T> sums[kTiles];
    clear(sums);
    add_products<false, false>(weights, weights_pitch, values, pitch, steps, room.depth / 16, sums);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (16 * j >= D) break;
      each_number(sums[j], scores, [&](int, int row, int column, float sum) {
        const float by = __shfl_sync(kAllLanes, factor, row);
        if (first + row < in.M && 16 * j + column < D)
          narrow(by == 0 ? 0.0f : sum * by, out.row(b, first + row, h)[16 * j + column]);
      });
    }
    __syncwarp();
  }
}

// The gradients of a head. Warp w sums those of keys and values 16 w and on in registers, over 32 queries at a time.
template <class T, int kTiles>
__global__ void __launch_bounds__(2 * kMostTokens)
    attention_backward_kernel(Inputs<T> in, Heads<const T> grad, Heads<const T> out, Heads<T> of_q, Heads<T> of_k,
                              Heads<T> of_v, Drop drop, bool wide) {
  HUBERT_ECG_SHARED(unsigned char, raw);
  const Room<T> room(in.tokens, in.D);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, D = int(in.D);
  const int64_t b = blockIdx.x / in.H, h = blockIdx.x % in.H;
  int* const list = reinterpret_cast<int*>(raw);
  unsigned* const words = reinterpret_cast<unsigned*>(list + kMostTokens);
  T *const keys = reinterpret_cast<T*>(raw + room.keys), *const values = reinterpret_cast<T*>(raw + room.values),
           *const queries = reinterpret_cast<T*>(raw + room.rest), *const grads = queries + kRows * room.pitch,
           *const weights = grads + kRows * room.pitch, *const of_scores = weights + kRows * room.weights_pitch;
  float *const logsumexps = reinterpret_cast<float*>(of_scores + kRows * room.weights_pitch), *const means =
                                                                                                  logsumexps + kRows;
  int* const tokens = reinterpret_cast<int*>(means + kRows);
  float *const tile = reinterpret_cast<float*>(raw + room.tiles()) + warp * 16 * kRoomPitch,
               *const sums = reinterpret_cast<float*>(raw + room.sums());
  const int pitch = room.pitch, weights_pitch = room.weights_pitch, depth = room.depth;

  const int n = list_keys<T>(in, b, list, words), steps = (n + 15) / 16;
  const auto key = [&](int row) { return int64_t(row < n ? list[row] : -1); };
  load_rows(in.k, b, h, 16 * steps, D, depth, wide, threadIdx.x, blockDim.x, key, keys, pitch);
  load_rows(in.v, b, h, 16 * steps, D, depth, wide, threadIdx.x, blockDim.x, key, values, pitch);
  if (in.queries)
    for (int i = threadIdx.x; i < room.tokens * depth; i += blockDim.x) sums[i] = 0;
  __syncthreads();
  const Keep keep(in.seed, drop);
  const float kept = float(drop.scale);
  Tile<T> sum_k[kTiles], sum_v[kTiles];
  clear(sum_k);
  clear(sum_v);
  for (int64_t first = 0; first < in.M; first += kRows) {
    const int row_tiles = in.M - first > 16 ? 2 : 1;
    const auto query = [&](int row) { return token_of(in, b, first + row); };
    const auto result = [&](int row) { return query(row) < 0 ? int64_t(-1) : first + row; };
    load_rows(in.q, b, h, 16 * row_tiles, D, depth, wide, threadIdx.x, blockDim.x, query, queries, pitch);
    load_rows(grad, b, h, 16 * row_tiles, D, depth, wide, threadIdx.x, blockDim.x, result, grads, pitch);
    for (int r = warp; r < 16 * row_tiles; r += warps) {
      const int token = int(query(r));
      const float mean = token < 0 ? 0.0f : dot_of_warp(grad.row(b, first + r, h), out.row(b, first + r, h), D);
      if (lane == 0) {
        tokens[r] = token;
        means[r] = mean;
        logsumexps[r] = token < 0 ? 0.0f : in.logsumexp[(b * in.H + h) * in.M + first + r];
      }
    }
    __syncthreads();
    for (int i = 0; warp < steps && i < row_tiles; ++i) {
      Tile<T> score[1], of_weight[1];
      clear(score);
      clear(of_weight);
      const int at = 16 * i * pitch, of_warp = 16 * warp * pitch;
      add_products<false, true>(queries + at, pitch, keys + of_warp, pitch, depth / 16, 1, score);
      add_products<false, true>(grads + at, pitch, values + of_warp, pitch, depth / 16, 1, of_weight);
      float of_weights[8];
      each_number(of_weight[0], tile, [&](int which, int, int, float of) { of_weights[which] = of; });
      each_number(score[0], tile, [&](int which, int row, int column, float product) {
        const int r = 16 * i + row, c = 16 * warp + column;
        float weight = 0, of_score = 0;
        if (c < n && tokens[r] >= 0) {
          const bool stays = keep(((b * in.H + h) * in.M + first + r) * in.tokens + list[c]);
          weight = std::exp(in.scale * product - logsumexps[r]);
          of_score = weight * ((stays ? of_weights[which] * kept : 0.0f) - means[r]);
          weight = stays ? weight : 0.0f;
        }
        narrow(weight, weights[r * weights_pitch + c]);
        narrow(of_score, of_scores[r * weights_pitch + c]);
      });
    }
    __syncthreads();
    if (warp < steps) {
      add_products<true, false>(weights + 16 * warp, weights_pitch, grads, pitch, row_tiles, depth / 16, sum_v);
      add_products<true, false>(of_scores + 16 * warp, weights_pitch, queries, pitch, row_tiles, depth / 16, sum_k);
    }
    for (int j = warp; j < depth / 16; j += warps) {
      for (int i = 0; i < row_tiles; ++i) {
        Tile<T> sum[1];
        clear(sum);
        add_products<false, false>(of_scores + 16 * i * weights_pitch, weights_pitch, keys + 16 * j, pitch, steps, 1,
                                   sum);
        if (!in.queries) {
          each_number(sum[0], tile, [&](int, int row, int column, float value) {
            if (first + 16 * i + row < in.M && 16 * j + column < D)
              narrow(value * in.scale, of_q.row(b, first + 16 * i + row, h)[16 * j + column]);
          });
          continue;
        }
        // Rows of one token are added in their order.
        __syncwarp();
        store_tile(sum[0], tile, kRoomPitch);
        __syncwarp();
        for (int r = 0; lane < 16 && r < 16; ++r)
          if (tokens[16 * i + r] >= 0) sums[tokens[16 * i + r] * depth + 16 * j + lane] += tile[r * kRoomPitch + lane];
      }
    }
    __syncthreads();
  }
  if (warp < steps) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (16 * j >= D) break;
      const auto write = [&](const Heads<T>& to, float by) {
        return [&to, by, &list, n, warp, b, h, j, D](int, int row, int column, float value) {
          const int c = 16 * warp + row, d = 16 * j + column;
          if (c < n && d < D) narrow(value * by, to.row(b, list[c], h)[d]);
        };
      };
      each_number(sum_k[j], tile, write(of_k, in.scale));
      each_number(sum_v[j], tile, write(of_v, kept));
    }
  }
  for (int i = threadIdx.x; i < int(in.tokens) * D; i += blockDim.x) {
    const int t = i / D, d = i % D;
    if (in.queries) narrow(sums[t * depth + d] * in.scale, of_q.row(b, t, h)[d]);
    if (n < in.tokens && !(words[t / 32] >> t % 32 & 1)) {
      narrow(0.0f, of_k.row(b, t, h)[d]);
      narrow(0.0f, of_v.row(b, t, h)[d]);
    }
  }
}

// Whether rows of D numbers may be read 16 bytes at a time.
template <class T>
bool is_wide(const Heads<const T>& x, int64_t D) {
  const uintptr_t bytes = reinterpret_cast<uintptr_t>(x.data) | (x.b | x.t | x.h | D) * sizeof(T);
  return bytes % 16 == 0;
}
template <class T>
bool is_wide(const Inputs<T>& in) {
  return is_wide(in.q, in.D) && is_wide(in.k, in.D) && is_wide(in.v, in.D);
}

template <class T>
bool fits(const Inputs<T>& in) {
  return in.tokens > 0 && in.tokens <= kMostTokens && in.D <= kMostDim;
}

template <class T, class Kernel, class... Args>
void launch_heads(const char* op, Kernel* kernel, const Inputs<T>& in, int warps, int bytes, intptr_t stream,
                  const Args&... args) {
  allow_shared(op, kernel, bytes);
  HUBERT_ECG_LAUNCH(kernel, num_blocks(op, in.B * in.H), 32u * warps, static_cast<size_t>(bytes), stream, in, args...);
}

// Whether there was room.
template <class T>
bool run_fast(const char* op, const Inputs<T>& in, const Heads<T>& out, const Drop& drop, intptr_t stream) {
  if (!fits<T>(in)) return false;
  const Room<T> room(in.tokens, in.D);
  const int most = most_shared_bytes();
  int warps = room.tokens / 16;
  while (warps > 0 && room.forward(warps) > most) --warps;
  if (warps == 0) return false;
  launch_heads<T>(op, in.D <= 64 ? attention_kernel<T, 4> : attention_kernel<T, 8>, in, warps, room.forward(warps),
                  stream, out, drop, is_wide<T>(in));
  return true;
}

template <class T>
bool run_fast_backward(const char* op, const Inputs<T>& in, const Heads<const T>& grad, const Heads<const T>& out,
                       const Heads<T>& q, const Heads<T>& k, const Heads<T>& v, const Drop& drop, intptr_t stream) {
  if (!fits<T>(in)) return false;
  const Room<T> room(in.tokens, in.D);
  const int bytes = room.backward(in.queries);
  if (bytes > most_shared_bytes()) return false;
  launch_heads<T>(op, in.D <= 64 ? attention_backward_kernel<T, 4> : attention_backward_kernel<T, 8>, in,
                  room.tokens / 16, bytes, stream, grad, out, q, k, v, drop, is_wide<T>(in) && is_wide(grad, in.D));
  return true;
}

template <class T>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans, const Tensor& queries,
         const Tensor& seed, const Tensor& out, const Tensor& logsumexp, double dropout_p, double scale,
         intptr_t stream) {
  const char* const op = "masked_span_attention";
  const Inputs<T> in =
      attention_inputs<T, Wide<T>>(op, q, k, v, spans, queries, seed, out, logsumexp, dropout_p, scale);
  if (in.B * in.H * in.M * in.D == 0) return;
  const Drop drop = {dropout_threshold(dropout_p), dropout_scale(dropout_p)};
  bool done = false;
  if constexpr (!std::is_same_v<T, double>) done = run_fast<T>(op, in, heads<T>(out), drop, stream);
  if (!done) run_plain<T>(op, in, heads<T>(out), drop, stream);
  check_cuda(op, cudaGetLastError());
}

template <class T>
void run_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                  const Tensor& logsumexp, const Tensor& spans, const Tensor& queries, const Tensor& seed,
                  const Tensor& gradients, double dropout_p, double scale, intptr_t stream) {
  const char* const op = "masked_span_attention_backward";
  const Inputs<T> in =
      attention_inputs<T, Wide<T>>(op, q, k, v, spans, queries, seed, out, logsumexp, dropout_p, scale);
  check_attention_gradients<T>(grad, q, out, gradients);
  if (in.B * in.H * in.tokens * in.D == 0) return;
  const Drop drop = {dropout_threshold(dropout_p), dropout_scale(dropout_p)};
  const Heads<const T> from = heads<const T>(grad), result = heads<const T>(out);
  const Heads<T> of_q = packed_heads<T>(gradients, 0), of_k = packed_heads<T>(gradients, 1),
                 of_v = packed_heads<T>(gradients, 2);
  bool done = false;
  if constexpr (!std::is_same_v<T, double>)
    done = run_fast_backward<T>(op, in, from, result, of_q, of_k, of_v, drop, stream);
  if (!done) run_plain_backward<T>(op, in, from, result, of_q, of_k, of_v, drop, stream);
  check_cuda(op, cudaGetLastError());
}

}  // namespace

void masked_span_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor queries, Tensor seed, Tensor out,
                                Tensor logsumexp, double dropout_p, double scale, intptr_t stream) {
  of_type<__half, __nv_bfloat16>(q, [&](auto one) {
    run<decltype(one)>(q, k, v, spans, queries, seed, out, logsumexp, dropout_p, scale, stream);
  });
}

void masked_span_attention_backward_cuda(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,
                                         Tensor spans, Tensor queries, Tensor seed, Tensor gradients, double dropout_p,
                                         double scale, intptr_t stream) {
  of_type<__half, __nv_bfloat16>(q, [&](auto one) {
    run_backward<decltype(one)>(grad, q, k, v, out, logsumexp, spans, queries, seed, gradients, dropout_p, scale,
                                stream);
  });
}

}  // namespace hubert_ecg
