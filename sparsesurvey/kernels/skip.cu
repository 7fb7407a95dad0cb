// Skip what is not stored: y = x @ W.T for so few weights that ordinary arithmetic beats tensor cores. An activation that is
// read from shared memory serves one weight, so that reading it is the limit: 8 tokens, 16 bytes, by one thread at a time.
//
// The activations are feature-major. A block of threads has HIGH outputs and TOKENS tokens, whose sums stay in registers, and
// goes through the inputs DEEP at a time, STAGES - 1 ahead (cp.async). LANES threads are a team with ROWS outputs, one after
// the other: they read the same weight and 8 tokens each of its input, for 8 of them a whole row of 128 bytes, which meets
// each bank once.
//
// Set from outside: LANES, WARPS, ROWS, DEEP, STAGES, and BFLOAT (or float16), PARTS (are there several parts of the inputs,
// whose float32 sums are added up later?) and FEATURES (is y feature-major?), 0 or 1.

typedef unsigned int u32;
typedef unsigned short u16;

#define THREADS (32 * WARPS)
#define TOKENS (8 * LANES)
#define HIGH (THREADS / LANES * ROWS)

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

// 16 bytes from global to shared memory in the background, zeros where nothing is ``there``
DEVICE void copy(u16* target, const u16* source, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
                 ::"r"((u32)__cvta_generic_to_shared(target)), "l"(source), "r"(there ? 16 : 0));
}

DEVICE void close_group() { asm volatile("cp.async.commit_group;\n"); }

template <int LEFT> DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT)); }

DEVICE void barrier() { __syncthreads(); }

// The numbers in the lower and upper half of a word
DEVICE float lower(u32 word) {
#if BFLOAT
    return __uint_as_float(word << 16);
#else
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"((u16)word));
    return number;
#endif
}

DEVICE float upper(u32 word) {
#if BFLOAT
    return __uint_as_float(word & 0xFFFF0000);
#else
    return lower(word >> 16);
#endif
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

DEVICE Four peek(const Four* source) { return *source; } // of shared memory

// 16 bytes at once, which the compiler would take apart where it is not told
DEVICE void write(u16* target, const Four& four) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n"
                 ::"l"(target), "r"(four.part[0]), "r"(four.part[1]), "r"(four.part[2]), "r"(four.part[3]) : "memory");
}

#endif

// The thread's share of DEEP rows of x.T.
DEVICE void fetch(u16* stage, const u16* xt, long long block, long long first, long long inputs, long long row_width, long long x_width) {
#pragma unroll
    for (int number = threadIdx.x; number < DEEP * LANES; number += THREADS) {
        const int row = number / LANES, across = number % LANES * 8;
        const bool there = block * DEEP + row < inputs && first + across < row_width;
        copy(stage + row * TOKENS + across, there ? xt + (block * DEEP + row) * x_width + first + across : xt, there);
    }
}

// One weight, its input's number above and its value below, times 8 tokens
DEVICE void add(float (&sums)[8], u32 entry, const u16* activations) {
    const Four eight = peek((const Four*)(activations + (entry >> 16) * TOKENS));
    const float weight = lower(entry);
#pragma unroll
    for (int part = 0; part < 4; part++) {
        sums[2 * part] += weight * lower(eight.part[part]);
        sums[2 * part + 1] += weight * upper(eight.part[part]);
    }
}

// One token's sums to y, 8 outputs at a time where they lie at a multiple of 16 bytes.
DEVICE void store(void* y, const float (&sums)[ROWS][8], int k, long long line, long long row, long long outputs, long long y_width) {
    if (!PARTS && ROWS % 8 == 0 && outputs % 8 == 0) {
#pragma unroll
        for (int i = 0; i + 8 <= ROWS; i += 8) {
            Four eight;
#pragma unroll
            for (int pair = 0; pair < 4; pair++)
                eight.part[pair] = rounded(sums[i + 2 * pair][k]) | (u32)rounded(sums[i + 2 * pair + 1][k]) << 16;
            if (row + i < outputs)
                write((u16*)y + line * y_width + row + i, eight);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        if (row + i < outputs) {
            if (PARTS)
                ((float*)y)[line * y_width + row + i] = sums[i][k];
            else
                ((u16*)y)[line * y_width + row + i] = rounded(sums[i][k]);
        }
}

// entries: weights by block of DEEP inputs, then output, then input, of output r in block b from pointers[b * outputs + r] to
// the next pointer. xt [inputs, x_width] of which row_width numbers are tokens or zeros. y [tokens, y_width], feature-major
// [outputs, y_width], or with PARTS float32 [parts, tokens, y_width], ``each`` blocks a part.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
product(const Four* entries, const u32* pointers, const u16* xt, void* y, long long tokens, long long row_width, long long inputs,
        long long outputs, long long x_width, long long y_width, long long blocks, long long each) {
    SHARED;
    const int heights = (outputs + HIGH - 1) / HIGH, strips = (tokens + TOKENS - 1) / TOKENS;
    const int height = blockIdx.x % heights, strip = blockIdx.x / heights % strips, part = blockIdx.x / heights / strips;
    const int lane = threadIdx.x % LANES, begin = part * each, end = begin + each < blocks ? begin + each : blocks;
    const long long row = (long long)height * HIGH + threadIdx.x / LANES * ROWS, first = (long long)strip * TOKENS;

    for (int ahead = 0; ahead < STAGES - 1; ahead++) {
        if (begin + ahead < end)
            fetch(shared + ahead * DEEP * TOKENS, xt, begin + ahead, first, inputs, row_width, x_width);
        close_group();
    }
    float sums[ROWS][8];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int token = 0; token < 8; token++)
            sums[i][token] = 0;

    for (int block = begin; block < end; block++) {
        const long long line = block * outputs; // outputs that are not there have no entries
        int from = read(pointers + line + (row < outputs ? row : outputs)), to = read(pointers + line + (row + 1 < outputs ? row + 1 : outputs));
        Four next = read(entries + from / 4);
        wait_groups<STAGES - 2>();
        barrier(); // these inputs are there for all, and those before have been used by all
        if (block + STAGES - 1 < end)
            fetch(shared + (block - begin + STAGES - 1) % STAGES * DEEP * TOKENS, xt, block + STAGES - 1, first, inputs, row_width, x_width);
        close_group();
        const u16* activations = shared + (block - begin) % STAGES * DEEP * TOKENS + lane * 8;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            Four four = next;
            int after = to; // where the next output's entries end
            if (i + 1 < ROWS) {
                after = read(pointers + line + (row + i + 2 < outputs ? row + i + 2 : outputs));
                next = read(entries + to / 4);
            }
            while (from < to) {
                const int start = from & ~3; // of the four at hand
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (start + k >= from && start + k < to)
                        add(sums[i], four.part[k], activations);
                from = start + 4;
                if (from < to)
                    four = read(entries + from / 4);
            }
            from = to;
            to = after;
        }
    }

    const long long token = first + lane * 8;
    if constexpr (FEATURES) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            Four eight;
#pragma unroll
            for (int pair = 0; pair < 4; pair++)
                eight.part[pair] = rounded(sums[i][2 * pair]) | (u32)rounded(sums[i][2 * pair + 1]) << 16;
            if (row + i < outputs && token < tokens)
                write((u16*)y + (row + i) * y_width + token, eight);
        }
    } else
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (token + k < tokens)
                store(y, sums, k, part * tokens + token + k, row, outputs, y_width);
}
