// Panels with 2:4 inside on sparse tensor cores: y = x @ W.T for a weight whose panels each keep their own inputs, of
// every four of which a row keeps two. Every 64 inputs of a panel are one step; 16-bit numbers, sums in float32.
//
// A block of threads multiplies BM rows of a panel by BT tokens. The inputs' rows of x.T are gathered to shared memory,
// STAGES steps ahead (cp.async), and come from there to registers transposed (ldmatrix.trans), as the second operand of
// mma.sp.m16n8k32 wants them. The weights lie in memory as their fragments (kernels/mma_sp.py): a thread reads its own.
//
// Set from outside: WM, WN warps down and across, MF, NF tiles of 16 rows and of 8 tokens a warp, STAGES, and BFLOAT
// (or float16) and FEATURES (is y feature-major?), 0 or 1.

typedef unsigned int u32;
typedef unsigned short u16;

#define THREADS (32 * WM * WN)
#define BM (16 * WM * MF)
#define BT (8 * WN * NF)
#define DEEP 64
#define PITCH (BT + 8) // numbers from one row of a stage to the next: 16 bytes more, so that ldmatrix meets each bank once
#define LANES (BT < 64 ? BT / 8 : 8) // threads that copy of one row, 16 bytes each: 128 bytes together
#define ROWS (DEEP * LANES / THREADS) // of which a thread copies in one step
#define GROUP 8 // strips of tokens that go through all panels before the next ones, to stay in the L2 cache

struct alignas(16) Four {
    u32 part[4];
};

#ifdef EMULATED // the name of a test's file that emulates these few instructions, to run the rest of this file on a CPU
#include EMULATED
#else

#define DEVICE __device__ __forceinline__
#define SHARED extern __shared__ __align__(16) u16 shared[]

#if BFLOAT
#define KIND "bf16"
#else
#define KIND "f16"
#endif

DEVICE u32 place(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes from global to shared memory in the background, zeros where nothing is ``there``
DEVICE void copy(u16* target, const u16* source, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(place(target)), "l"(source), "r"(there ? 16 : 0));
}

DEVICE void close_group() { asm volatile("cp.async.commit_group;\n"); }

template <int LEFT> DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT)); }

DEVICE void barrier() { __syncthreads(); }

// 32 rows of 8 numbers, the address of row l given by lane l, as the second operand of one mma.sp
DEVICE void load_transposed(u32 (&b)[4], const u16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(place(row)));
}

// SELECTOR: do lanes 0 and 1 of every four hold the positions, or 2 and 3?
template <int SELECTOR> DEVICE void multiply(float (&d)[4], const Four& a, const u32 (&b)[4], u32 positions) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." KIND "." KIND ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(positions), "n"(SELECTOR));
}

DEVICE u16 rounded(float number) {
    u16 bits;
    asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

DEVICE Four read(const Four* source) {
    uint4 four = __ldg((const uint4*)source);
    return {four.x, four.y, four.z, four.w};
}

DEVICE u32 read(const u32* source) { return __ldg(source); }

#endif

// The thread's share of one step's activations. ``inputs`` are those of the rows that it copies.
DEVICE void fetch(u16* stage, const int (&inputs)[ROWS], const u16* xt, long long x_width, int first, int row_width) {
#pragma unroll
    for (int number = 0; number < ROWS; number++) {
        const int row = (threadIdx.x + number * THREADS) / LANES;
        const u16* source = xt + inputs[number] * x_width + first;
#pragma unroll
        for (int across = threadIdx.x % LANES * 8; across < BT; across += LANES * 8) {
            const bool there = first + across < row_width;
            copy(stage + row * PITCH + across, there ? source + across : xt, there);
        }
    }
}

DEVICE void look_up(int (&inputs)[ROWS], const u32* columns, int step) {
#pragma unroll
    for (int number = 0; number < ROWS; number++)
        inputs[number] = (int)read(columns + (long long)step * DEEP + (threadIdx.x + number * THREADS) / LANES);
}

// weights [steps, height / 16, 2, 32] fragments, positions [steps, height / 16, 32], columns [steps, DEEP], pointers
// [panels + 1] in steps, xt [inputs, x_width] of which row_width numbers are tokens or zeros, y [tokens, y_width] or,
// feature-major, [outputs, y_width]; all integers but those in memory are 64 bits wide, as Python's come
extern "C" __global__ void __launch_bounds__(THREADS, 1)
product(const Four* weights, const u32* positions, const u32* columns, const u32* pointers, const u16* xt, u16* y,
        long long tokens, long long row_width, long long panels, long long height, long long x_width, long long y_width) {
    SHARED;
    const int thread = threadIdx.x, lane = thread % 32, down = thread / 32 % WM, across = thread / 32 / WM;
    const int blocks = height / 16, pieces = height / BM, strips = (tokens + BT - 1) / BT;
    const int work = panels * pieces * GROUP, before = blockIdx.x / work * GROUP;
    const int side = strips - before < GROUP ? strips - before : GROUP;
    const int first = (before + blockIdx.x % work % side) * BT, panel = blockIdx.x % work / side / pieces;
    const int piece = blockIdx.x % work / side % pieces;
    const int start = read(pointers + panel), stop = read(pointers + panel + 1);
    const int block = piece * WM * MF + down * MF; // of 16 rows, the warp's first in its panel

    float sums[MF][NF][4];
#pragma unroll
    for (int i = 0; i < MF; i++)
#pragma unroll
        for (int j = 0; j < NF; j++)
#pragma unroll
            for (int part = 0; part < 4; part++)
                sums[i][j][part] = 0;

    int inputs[ROWS]; // of the step to be fetched next
    for (int ahead = 0; ahead < STAGES - 1; ahead++) {
        if (start + ahead < stop) {
            look_up(inputs, columns, start + ahead);
            fetch(shared + ahead * DEEP * PITCH, inputs, xt, x_width, first, row_width);
        }
        close_group();
    }
    if (start + STAGES - 1 < stop)
        look_up(inputs, columns, start + STAGES - 1);

    Four a[2][MF]; // of the two halves of a step
    u32 e[MF];
    if (start < stop)
#pragma unroll
        for (int i = 0; i < MF; i++) {
            a[0][i] = read(weights + ((long long)start * blocks + block + i) * 64 + lane);
            e[i] = read(positions + ((long long)start * blocks + block + i) * 32 + lane);
        }

    for (int step = start; step < stop; step++) {
        wait_groups<STAGES - 2>();
        barrier(); // this step is there for all, and the one before has been used by all
        if (step + STAGES - 1 < stop) {
            fetch(shared + (step - start + STAGES - 1) % STAGES * DEEP * PITCH, inputs, xt, x_width, first, row_width);
            if (step + STAGES < stop)
                look_up(inputs, columns, step + STAGES);
        }
        close_group();
        const u16* stage = shared + (step - start) % STAGES * DEEP * PITCH + lane * PITCH + across * NF * 8;
        const int next = step + 1 < stop ? step + 1 : step;
        u32 following[MF];
#pragma unroll
        for (int i = 0; i < MF; i++) {
            a[1][i] = read(weights + (((long long)step * blocks + block + i) * 2 + 1) * 32 + lane);
            following[i] = read(positions + ((long long)next * blocks + block + i) * 32 + lane);
        }
#pragma unroll
        for (int j = 0; j < NF; j++) {
            u32 b[4];
            load_transposed(b, stage + j * 8);
#pragma unroll
            for (int i = 0; i < MF; i++)
                multiply<0>(sums[i][j], a[0][i], b, e[i]);
        }
#pragma unroll
        for (int i = 0; i < MF; i++)
            a[0][i] = read(weights + ((long long)next * blocks + block + i) * 64 + lane);
#pragma unroll
        for (int j = 0; j < NF; j++) {
            u32 b[4];
            load_transposed(b, stage + 32 * PITCH + j * 8);
#pragma unroll
            for (int i = 0; i < MF; i++)
                multiply<1>(sums[i][j], a[1][i], b, e[i]);
        }
#pragma unroll
        for (int i = 0; i < MF; i++)
            e[i] = following[i];
    }

    // Through shared memory, so that rows of y are written 16 bytes at a time.
    wait_groups<0>();
    barrier();
    const int line = FEATURES ? BT + 8 : BM + 8;
#pragma unroll
    for (int i = 0; i < MF; i++)
#pragma unroll
        for (int j = 0; j < NF; j++)
#pragma unroll
            for (int part = 0; part < 4; part++) {
                int row = (down * MF + i) * 16 + lane / 4 + part / 2 * 8, token = (across * NF + j) * 8 + lane % 4 * 2 + part % 2;
                shared[FEATURES ? row * line + token : token * line + row] = rounded(sums[i][j][part]);
            }
    barrier();
    const long long top = panel * height + piece * BM;
    for (int number = thread; number < BM * BT / 8; number += THREADS) {
        if (FEATURES) {
            int row = number / (BT / 8), token = number % (BT / 8) * 8;
            if (first + token < row_width)
                *(Four*)(y + (top + row) * y_width + first + token) = *(Four*)(shared + row * line + token);
        } else {
            int token = number / (BM / 8), row = number % (BM / 8) * 8;
            if (first + token < tokens)
                *(Four*)(y + (first + token) * y_width + top + row) = *(Four*)(shared + token * line + row);
        }
    }
}
