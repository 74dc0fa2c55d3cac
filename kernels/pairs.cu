// Scores of pairs of a list. What scores a pair, and FP_PRECISION, FP_LANES and FP_PRODUCTS_ONLY:
// see pair.cuh.
//
// FP_HOLD  1, of products only: a group keeps the left row in registers as long as it stays the same

// --- rows that stay ------------------------------------------------------------------------------

#define FP_HELD 8  // vectors of the left row that a thread keeps

struct HeldRow {
  uint4 columns[FP_HELD];
  i64 number;  // -1: none
};

__device__ __forceinline__ void hold_row(HeldRow& held, i64 number, const Rows& rows,
                                         const Layout& layout) {
  if (held.number == number) return;
  held.number = number;
#pragma unroll
  for (int n = 0; n < FP_HELD; ++n) {
    const int vector = rows.subgroup + n * FP_SUBGROUPS;
    if (vector >= layout.runs[0] + layout.runs[1]) break;
    held.columns[n] = load_16_bytes(rows.left + vector * FP_VECTOR_BYTES);
    if (vector >= layout.runs[0]) negate(held.columns[n]);
  }
}

__device__ __forceinline__ void add_held_terms(Lanes& lanes, const HeldRow& held, const Rows& rows,
                                               const Layout& layout) {
#pragma unroll
  for (int n = 0; n < FP_HELD; ++n) {
    const int vector = rows.subgroup + n * FP_SUBGROUPS;
    if (vector >= layout.runs[0] + layout.runs[1]) break;
    const uint4 right = load_16_bytes(rows.right + vector * FP_VECTOR_BYTES);
    add_products(lanes, held.columns[n], right, vector >= layout.runs[0]);
  }
}

// --- the list of pairs ---------------------------------------------------------------------------

// Pairs of row numbers of 4 or 8 bytes, and which of them a group takes: those from
// group * group_step on, round_step apart. PAIR_LIST in gpu.py.
struct PairList {
  i64 count, group_step, round_step;
  int rounds, index_bytes;
};

struct Pair { i64 left, right; };

__device__ __forceinline__ Pair load_pair(const char* left, const char* right, i64 pair,
                                          const PairList& list) {
  if (pair >= list.count) return {-1, -1};
  return {load_number(left, pair, list.index_bytes), load_number(right, pair, list.index_bytes)};
}

// Fills `scores` of a list of pairs; a row number out of range gives NaN, and the least such pair
// is found in first_bad.
extern "C" __global__ void __launch_bounds__(256, 2)
score_pairs(const char* __restrict__ left_rows, const char* __restrict__ right_rows,
            i64 left_count, i64 right_count, const char* __restrict__ left,
            const char* __restrict__ right, float* __restrict__ scores,
            u64* __restrict__ first_bad, PairList list, Layout layout,
            Constants constants) {
  const int lane = threadIdx.x % FP_LANES;
  const i64 group =
      (i64)blockIdx.x * (blockDim.x / FP_LANES) + threadIdx.x / FP_LANES;
#if FP_HOLD
  HeldRow held;
  held.number = -1;
#endif
  i64 pair = group * list.group_step;
  Pair next = load_pair(left, right, pair, list);
  // All groups do all rounds: the sums are exchanged between threads.
  for (int round = 0; round < list.rounds; ++round, pair += list.round_step) {
    const Pair current = next;
    if (round + 1 < list.rounds) next = load_pair(left, right, pair + list.round_step, list);
    const bool usable = (u64)current.left < (u64)left_count &&
                        (u64)current.right < (u64)right_count;
    Lanes lanes = {};
    float bias = 0.0f, scales = 0.0f;
    if (usable) {
      const char* left_row = left_rows + current.left * layout.row_bytes;
      const char* right_row = right_rows + current.right * layout.row_bytes;
      load_fields(left_row, right_row, layout, bias, scales);
      const Rows rows = own_part(left_row, right_row);
#if FP_HOLD
      if (layout.runs[0] + layout.runs[1] <= FP_HELD * FP_SUBGROUPS) {
        hold_row(held, current.left, rows, layout);
        add_held_terms(lanes, held, rows, layout);
      } else
#endif
        add_terms(lanes, rows, layout);
    }
    const float raw = raw_score(lanes, bias, scales, constants);
    if (lane != 0 || pair >= list.count) continue;
    scores[pair] = usable ? apply_link(raw, constants) : not_a_number();
    if (!usable) atomicMin(first_bad, (u64)pair);
  }
}
