// What kernels with dense tensor cores need beside the rest: see emulated.h.

#include "emulated.h"

#define METHOD inline

DEVICE float read(const float* source) { return check_read(source, 4), *source; }

DEVICE void warp_barrier() { together(); }

DEVICE void check_inside(const void* start, size_t bytes) {
    const char *low = (const char*)shared_memory.data(), *high = (const char*)(shared_memory.data() + shared_memory.size());
    if ((size_t)start % bytes || (const char*)start < low || (const char*)start + bytes > high)
        fail("outside of shared memory, or not aligned");
}

DEVICE u32 peek(const u32* source) { return check_inside(source, 4), *source; }

DEVICE Four peek(const Four* source) { return check_inside(source, 16), *source; }

DEVICE u32 join(u32 low, u32 high) { return (low & 0xFFFF) | high << 16; }

DEVICE u32 byte_of(u32 word, int number) { return word >> 8 * number & 255; }

DEVICE int count_bits(u32 word) { return __builtin_popcount(word); }

typedef const char* Spot;

DEVICE Spot spot(const void* pointer) { return (Spot)pointer; }

DEVICE void take_16(u32& number, Spot& next, u32 there) {
    if (there) {
        check_inside(next, 2);
        number = *(const u16*)next;
        next += 2;
    }
}

DEVICE void take_32(u32& number, Spot& next, u32 there) {
    if (there) {
        check_inside(next, 4);
        number = *(const u32*)next;
        next += 4;
    }
}

static u32 offered[THREADS];

DEVICE u32 from_lane(u32 number, int lane) {
    offered[threadIdx.x] = number;
    together();
    u32 taken = offered[threadIdx.x / 32 * 32 + lane];
    together();
    return taken;
}

template <int DISTANCE> DEVICE void add_from_below(u32& number) {
    int lane = threadIdx.x % 32;
    u32 below = from_lane(number, lane < DISTANCE ? lane : lane - DISTANCE);
    if (lane >= DISTANCE)
        number += below;
}

// The first 16 lanes give the addresses of the rows of two matrices of 8 x 8; thread 4 g + t gets numbers 2 t, 2 t + 1 of row g.
DEVICE void load_rows(u32 (&b)[2], const u16* row) {
    check_shared(row, 8);
    rows[threadIdx.x] = row;
    together();
    int lane = threadIdx.x % 32, base = threadIdx.x - lane;
    for (int matrix = 0; matrix < 2; matrix++)
        memcpy(&b[matrix], rows[base + 8 * matrix + lane / 4] + lane % 4 * 2, 4);
    together();
}

// Row g or g + 8 of the first operand is with the threads 4 g to 4 g + 3, column c of the second with 4 c to 4 c + 3.
DEVICE void multiply(float (&d)[4], const Four& a, const u32 (&b)[2]) {
    lefts[threadIdx.x] = a;
    memcpy(rights[threadIdx.x], b, 8);
    together();
    int lane = threadIdx.x % 32, base = threadIdx.x - lane;
    for (int part = 0; part < 4; part++) {
        int lower = part / 2, column = lane % 4 * 2 + part % 2;
        for (int k = 0; k < 16; k++) {
            float left = widened(half_of(lefts[base + lane / 4 * 4 + k % 8 / 2].part[k / 8 * 2 + lower], k % 2));
            d[part] += left * widened(half_of(rights[base + 4 * column + k % 8 / 2][k / 8], k % 2));
        }
    }
    together();
}

DEVICE float lower(u32 word) { return widened(half_of(word, 0)); }

DEVICE float upper(u32 word) { return widened(half_of(word, 1)); }

DEVICE void write(u16* target, const Four& four) {
    if ((size_t)target % 16)
        fail("16 bytes are written to an address that is no multiple");
    memcpy(target, &four, 16);
}
