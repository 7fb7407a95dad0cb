// Load sparse, compute dense: y = x @ W.T for few tokens and a weight whose zeros are anywhere. What is read from memory is
// compressed, tiles of 64 x 64 weights as bits and values (kernels/bitmap.py); what tensor cores multiply is dense, for with few
// tokens they have time. A thread's bits are those of its own share of the instructions' first operand, so that a weight goes
// from the compressed tile in shared memory to the register that it is multiplied from, and an expanded tile is nowhere.
//
// A block of threads has DOWN tiles of 64 outputs below each other and a range of inputs, which SLICES warps a tile share. Each
// warp fetches its own tiles, STAGES - 1 ahead (cp.async); the range's activations are in shared memory for all of them.
//
// Set from outside: DOWN, SLICES, NT tiles of 8 tokens, UNIT weights a bit (1, or 2 neighbouring inputs), STAGES, and BFLOAT (or
// float16) and PARTS (are there several ranges, whose float32 sums are added up later?), 0 or 1.

typedef unsigned int u32;
typedef unsigned short u16;

#define THREADS (32 * DOWN * SLICES)
#define TOKENS (8 * NT)
#define SIDE 64
#define HEAD (32 / UNIT) // 16-byte units of a tile that are bits
#define LINE (SIDE + 4) // of float32 sums; from one token to the next 8 banks are passed over by two

struct alignas(16) Four {
    u32 part[4];
};

#ifdef EMULATED // the name of a test's file that emulates these few instructions, to run the rest of this file on a CPU
#include EMULATED
#else

#define DEVICE __device__ __forceinline__
#define METHOD DEVICE // of a struct
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

DEVICE void warp_barrier() { __syncwarp(); }

// Add what the lane so far below has; the lowest lanes have none.
template <int DISTANCE> DEVICE void add_from_below(u32& number) {
    asm volatile("{\n.reg .pred there;\n.reg .u32 other;\n"
                 "shfl.sync.up.b32 other|there, %0, %1, 0, 0xffffffff;\n"
                 "@there add.u32 %0, %0, other;\n}\n" : "+r"(number) : "n"(DISTANCE));
}

DEVICE u32 from_lane(u32 number, int lane) { return __shfl_sync(0xFFFFFFFF, number, lane); }

DEVICE int count_bits(u32 word) { return __popc(word); }

// 16 rows of 8 numbers, the address of row l given by lane l, as the second operand for 8 tokens of 16 inputs
DEVICE void load_rows(u32 (&b)[2], const u16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n" : "=r"(b[0]), "=r"(b[1]) : "r"(place(row)));
}

DEVICE void multiply(float (&d)[4], const Four& a, const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE u16 rounded(float number) {
    u16 bits;
    asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

DEVICE u32 read(const u32* source) { return __ldg(source); }

DEVICE u32 peek(const u32* source) { return *source; } // of shared memory

DEVICE u32 join(u32 low, u32 high) { return __byte_perm(low, high, 0x5410); }

DEVICE u32 byte_of(u32 word, int number) { return __byte_perm(word, 0, 0x4440 | number); }

typedef u32 Spot; // a place in shared memory

DEVICE Spot spot(const void* pointer) { return place(pointer); }

// The next number, if any bit of ``there`` is set, and on to the one after: one load and one addition, both conditional.
#define TAKE(SIZE, BYTES) \
    asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %2, 0;\n@there ld.shared." SIZE " %0, [%1];\n" \
                 "@there add.u32 %1, %1, " BYTES ";\n}\n" : "+r"(number), "+r"(next) : "r"(there))

DEVICE void take_16(u32& number, Spot& next, u32 there) { TAKE("u16", "2"); }

DEVICE void take_32(u32& number, Spot& next, u32 there) { TAKE("u32", "4"); }

#endif

// One tile to a stage of the warp's own: its bits and values lie together.
DEVICE void fetch(u16* stage, const Four* records, const u32* starts, long long tile, int lane) {
    const u32 start = read(starts + tile), stop = read(starts + tile + 1);
    const u16* source = (const u16*)(records + start);
    for (int unit = lane; unit < (int)(stop - start); unit += 32)
        copy(stage + unit * 8, source + unit * 8, true);
}

// Sums over this lane and those below it; bytes of a word that stay below 256 are summed side by side.
DEVICE u32 up_to(u32 number) {
    add_from_below<1>(number);
    add_from_below<2>(number);
    add_from_below<4>(number);
    add_from_below<8>(number);
    add_from_below<16>(number);
    return number;
}

// How many bits are set in the lower half of each byte.
DEVICE u32 count_lower_halves(u32 bits) {
    bits = (bits & 0x05050505) + (bits >> 1 & 0x05050505);
    return (bits & 0x03030303) + (bits >> 2 & 0x03030303);
}

// Where the values are that a thread needs next, one step of 16 inputs after the other. Its bits for a step are those of four
// operands of 16 x 16 weights, four registers each; a register holds two neighbouring inputs of one output.
struct Cursor {
#if UNIT == 1
    // Values lie by halves of an operand, of its left or right 8 inputs, and then thread after thread: 4 a thread at most, so
    // that what the warp reads at once is close together and meets few banks twice. Where each thread starts is found by
    // summing over the lanes, for four operands side by side.
    Spot next; // of the first value of the coming half
    u32 bits, before[2], all[2]; // by left and right, in a byte for each operand: values of lower lanes, and of all

    METHOD void start(const u16* stage, int) { next = spot(stage + HEAD * 8); }

    METHOD void step(const u16* stage, int number, int lane) {
        bits = peek((const u32*)stage + 4 * lane + number);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 own = count_lower_halves(bits >> 4 * half), sum = up_to(own);
            before[half] = sum - own;
            all[half] = from_lane(sum, 31);
        }
    }

    METHOD void operand(Four& a, int number) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Spot value = next + 2 * byte_of(before[half], number);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const u32 first = 1u << (8 * number + 4 * half + 2 * part);
                u32 low = 0, high = 0;
                take_16(low, value, bits & first);
                take_16(high, value, bits & first << 1);
                a.part[2 * half + part] = join(low, high);
            }
            next += 2 * byte_of(all[half], number);
        }
    }
#else
    // Pairs lie thread after thread, all of a tile: so few that threads seldom meet in a bank.
    Spot next; // this thread's
    u32 bits;

    METHOD void start(const u16* stage, int lane) {
        const u32* words = (const u32*)stage + 2 * lane;
        const u32 own = count_bits(peek(words)) + count_bits(peek(words + 1));
        next = spot(stage + HEAD * 8) + 4 * (up_to(own) - own);
    }

    METHOD void step(const u16* stage, int number, int lane) {
        bits = peek((const u32*)stage + 2 * lane + number / 2) >> 16 * (number % 2);
    }

    METHOD void operand(Four& a, int number) {
#pragma unroll
        for (int part = 0; part < 4; part++) {
            a.part[part] = 0;
            take_32(a.part[part], next, bits & 1u << (4 * number + part));
        }
    }
#endif
};

// records: tiles as kernels/bitmap.py lays them out, at starts [tiles + 1] in units of 16 bytes; tiles from left to right, then
// down, ``across`` in a row. x [tokens, x_width] of which ``inputs`` are numbers, a multiple of 8. y [tokens, outputs], or with
// PARTS float32 [parts, tokens, outputs], ``each`` tiles across a part. capacity: units of the largest tile.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
product(const Four* records, const u32* starts, const u16* x, void* y, long long tokens, long long inputs, long long x_width,
        long long outputs, long long across, long long each, long long capacity) {
    SHARED;
    const int thread = threadIdx.x, lane = thread % 32, down = thread / 32 % DOWN, slice = thread / 32 / DOWN;
    const int groups = (outputs + SIDE * DOWN - 1) / (SIDE * DOWN), group = blockIdx.x % groups, part = blockIdx.x / groups;
    const int first = part * each, last = first + each < across ? first + each : across, pitch = each * SIDE + 8;

    for (int number = thread; number < TOKENS * each * 8; number += THREADS) {
        const int token = number / (int)(each * 8), column = number % (int)(each * 8) * 8, input = first * SIDE + column;
        const bool there = token < tokens && input < inputs;
        copy(shared + token * pitch + column, there ? x + token * x_width + input : x, there);
    }
    close_group();

    const int mine = (last - first + SLICES - 1) / SLICES, begin = first + slice * mine;
    const int end = (group * DOWN + down) * SIDE >= outputs ? begin : begin + mine < last ? begin + mine : last;
    const long long row = (long long)(group * DOWN + down) * across; // the number of the row's first tile
    u16* ring = shared + TOKENS * pitch + thread / 32 * STAGES * (int)capacity * 8;
    for (int ahead = 0; ahead < STAGES - 1; ahead++) {
        if (begin + ahead < end)
            fetch(ring + ahead * (int)capacity * 8, records, starts, row + begin + ahead, lane);
        close_group();
    }

    float sums[4][NT][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int number = 0; number < 4; number++)
                sums[i][j][number] = 0;
    wait_groups<STAGES - 1>();
    barrier(); // the activations are there for all

    for (int tile = begin; tile < end; tile++) {
        wait_groups<STAGES - 2>();
        warp_barrier(); // this tile is there for the whole warp, and the one before has been used by all of it
        if (tile + STAGES - 1 < end)
            fetch(ring + (tile - begin + STAGES - 1) % STAGES * (int)capacity * 8, records, starts, row + tile + STAGES - 1, lane);
        close_group();
        const u16* stage = ring + (tile - begin) % STAGES * (int)capacity * 8;
        const u16* activations = shared + lane % 8 * pitch + lane / 8 % 2 * 8 + (tile - first) * SIDE;
        Cursor cursor;
        cursor.start(stage, lane);
#pragma unroll 1 // more would take more registers than there are
        for (int step = 0; step < SIDE / 16; step++) {
            u32 b[NT][2];
#pragma unroll
            for (int j = 0; j < NT; j++)
                load_rows(b[j], activations + j * 8 * pitch + step * 16);
            cursor.step(stage, step, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Four a;
                cursor.operand(a, i);
#pragma unroll
                for (int j = 0; j < NT; j++)
                    multiply(sums[i][j], a, b[j]);
            }
        }
    }

    // The slices' sums through shared memory, added always in the same order, and to memory with outputs side by side.
    wait_groups<0>();
    barrier();
    float* line = (float*)shared + thread / 32 * TOKENS * LINE;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int number = 0; number < 4; number++)
                line[(j * 8 + lane % 4 * 2 + number % 2) * LINE + i * 16 + lane / 4 + number / 2 * 8] = sums[i][j][number];
    barrier();
    for (int number = thread; number < DOWN * SIDE * tokens; number += THREADS) {
        const int token = number / (DOWN * SIDE), place_ = number % (DOWN * SIDE);
        const long long output = (long long)group * DOWN * SIDE + place_;
        const float* sum = (const float*)shared + (place_ / SIDE * TOKENS + token) * LINE + place_ % SIDE;
        float total = 0;
#pragma unroll
        for (int other = 0; other < SLICES; other++)
            total += sum[other * DOWN * TOKENS * LINE];
        if (output < outputs) {
            if (PARTS)
                ((float*)y)[(part * tokens + token) * outputs + output] = total;
            else
                ((u16*)y)[token * outputs + output] = rounded(total);
        }
    }
}
