// Scores of pairs of rows by a network (kernels/__init__.py, `Network`), with the CPU's bits.
//
// A block takes 64 pairs through the layers. A layer is a product of matrices in tiles of 64 pairs
// by 64 units; each hidden unit starts at its bias and is one chain of fmaf over its inputs in
// order. Inputs of the first layer are made from the rows on the way; hidden units wait in
// `scratch`, which a block has for itself: [2][most units][64 pairs], so that a layer reads one
// half and fills the other.

#define FP_TILE 64
#define FP_STEP 16   // inputs that lie in shared memory together
#define FP_ROW (FP_TILE + 4)

// What is the same for all pairs; NETWORK_SHAPE in gpu.py.
struct NetworkShape {
  i64 pairs;
  int columns, orders, layers, direct;  // orders, direct: 0 or 1
  int most_units;                       // of a layer, a multiple of 64
  int rounds, index_bytes;
};

// Rows of the 64 pairs of a block, null where there is none.
struct Sides { const float *left, *right; };

// What the first layer sees at place k of a pair.
__device__ __forceinline__ float input_at(const Sides& sides, int k, const NetworkShape& shape) {
  const int part = k / shape.columns, column = k - part * shape.columns;
  if (shape.orders) return __ldg((part ? sides.right : sides.left) + column);
  const float x = __ldg(sides.left + column), y = __ldg(sides.right + column);
  if (part == 0) return x * y;
  return part == 1 ? fabsf(x - y) : x + y;
}

__device__ __forceinline__ int padded(int units) {
  return (units + FP_TILE - 1) / FP_TILE * FP_TILE;
}

// Fills `outputs` [units][64] with max(bias + matrix inputs, 0). `weights` are the layer's biases,
// then its matrix, inputs by units, units padded to 64. `previous` is null for the first layer.
__device__ __forceinline__ void run_layer(const float* previous, const Sides* sides,
                                          const float* weights, int inputs, int units,
                                          float* outputs, const NetworkShape& shape,
                                          float (*x)[FP_ROW], float (*w)[FP_TILE]) {
  const int thread = threadIdx.x, unit = thread % 16 * 4, pair = thread / 16 * 4;
  const int width = padded(units);
  for (int first = 0; first < width; first += FP_TILE) {
    float sums[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = __ldg(weights + first + unit + j);
    for (int start = 0; start < inputs; start += FP_STEP) {
      __syncthreads();  // before the tiles are filled again, and before `previous` is read
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (previous) {
          const int k = start + thread / 16;
          x[thread / 16][thread % 16 * 4 + n] =
              k < inputs ? previous[k * FP_TILE + thread % 16 * 4 + n] : 0.0f;
        } else {
          const int k = start + thread % 4 * 4 + n;
          const Sides own = sides[thread / 4];
          x[thread % 4 * 4 + n][thread / 4] =
              k < inputs && own.left ? input_at(own, k, shape) : 0.0f;
        }
        const int k = start + thread / 16;
        w[thread / 16][thread % 16 * 4 + n] =
            k < inputs ? __ldg(weights + (i64)(1 + k) * width + first + unit + n) : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < FP_STEP; ++k) {
        const float4 l = *(const float4*)&x[k][pair], r = *(const float4*)&w[k][unit];
        const float ls[4] = {l.x, l.y, l.z, l.w}, rs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(ls[i], rs[j], sums[i][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        outputs[(first + unit + j) * FP_TILE + pair + i] = fmaxf(sums[i][j], 0.0f);
  }
}

// output . hidden + direct . inputs of one pair, one product after another.
__device__ __forceinline__ float weighted_sum(const float* hidden, int pair, int units,
                                              const Sides& sides, const float* output,
                                              int inputs, const NetworkShape& shape) {
  float sum = 0.0f;
  for (int n = 0; n < units; ++n) sum += __ldg(output + n) * hidden[n * FP_TILE + pair];
  if (!shape.direct) return sum;
  for (int k = 0; k < inputs; ++k) sum += __ldg(output + units + k) * input_at(sides, k, shape);
  return sum;
}

// Fills `scores` of a list of pairs; a row number out of range gives NaN, and the least such pair
// is found in first_bad. `widths` are the inputs and the units of each layer; `weights` are those
// of the layers one after another (see run_layer), then output and direct.
extern "C" __global__ void __launch_bounds__(256, 2)
score_network(const char* __restrict__ left_rows, const char* __restrict__ right_rows,
              i64 left_count, i64 right_count, const char* __restrict__ left,
              const char* __restrict__ right, float* __restrict__ scores,
              u64* __restrict__ first_bad, const float* __restrict__ weights,
              const int* __restrict__ widths, float* scratch, NetworkShape shape, Layout layout,
              Constants constants) {
  __shared__ __align__(16) float x[FP_STEP][FP_ROW];  // read four at a time
  __shared__ __align__(16) float w[FP_STEP][FP_TILE];
  __shared__ Sides sides[FP_TILE];
  const int thread = threadIdx.x;
  const i64 half = (i64)shape.most_units * FP_TILE;
  float* const hidden = scratch + (i64)blockIdx.x * 2 * half;
  i64 pair = (i64)blockIdx.x * FP_TILE + thread;
  for (int round = 0; round < shape.rounds; ++round, pair += (i64)gridDim.x * FP_TILE) {
    const bool wanted = thread < FP_TILE && pair < shape.pairs;
    if (thread < FP_TILE) {
      const i64 row = wanted ? load_number(left, pair, shape.index_bytes) : -1;
      const i64 column = wanted ? load_number(right, pair, shape.index_bytes) : -1;
      const bool usable = (u64)row < (u64)left_count &&
                          (u64)column < (u64)right_count;
      sides[thread].left = usable ? (const float*)(left_rows + row * layout.row_bytes) : nullptr;
      sides[thread].right =
          usable ? (const float*)(right_rows + column * layout.row_bytes) : nullptr;
    }
    float raw = 0.0f;
    for (int order = 0; order <= shape.orders; ++order) {
      const float* own = weights;
      const float* previous = nullptr;
      for (int layer = 0; layer < shape.layers; ++layer) {
        float* const outputs = hidden + layer % 2 * half;
        const int inputs = __ldg(widths + layer), units = __ldg(widths + layer + 1);
        run_layer(previous, sides, own, inputs, units, outputs, shape, x, w);
        own += (i64)(1 + inputs) * padded(units);
        previous = outputs;
      }
      __syncthreads();  // the last layer is whole
      if (thread < FP_TILE && sides[thread].left) {
        const int units = __ldg(widths + shape.layers);
        const float sum =
            weighted_sum(previous, thread, units, sides[thread], own, __ldg(widths), shape);
        raw = order ? (raw + sum) * 0.5f : sum;
        const Sides turned = {sides[thread].right, sides[thread].left};
        sides[thread] = turned;  // the other order
      }
      __syncthreads();  // and its rows are not needed any more
    }
    if (!wanted) continue;
    const bool usable = sides[thread].left != nullptr;
    scores[pair] = usable ? apply_link(constants.constant + raw, constants) : not_a_number();
    if (!usable) atomicMin(first_bad, (u64)pair);
  }
}
