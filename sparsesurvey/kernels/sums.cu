// What several blocks of threads have summed over their parts of the inputs, added up: y = parts.sum(0), always in the same order.
// Set from outside: BFLOAT (or float16), 0 or 1.

typedef unsigned int u32;
typedef unsigned short u16;

#define THREADS 256

struct alignas(16) Four {
    u32 part[4];
};

#ifdef EMULATED // the name of a test's file that emulates these few instructions, to run the rest of this file on a CPU
#include EMULATED
#else

#define DEVICE __device__ __forceinline__

#if BFLOAT
#define KIND "bf16"
#else
#define KIND "f16"
#endif

DEVICE u16 rounded(float number) {
    u16 bits;
    asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

DEVICE float read(const float* source) { return __ldg(source); }

#endif

// sums [parts, count] to y [count]
extern "C" __global__ void __launch_bounds__(THREADS)
add_up(const float* sums, u16* y, long long parts, long long count) {
    const long long number = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (number >= count)
        return;
    float total = 0;
    for (long long part = 0; part < parts; part++)
        total += read(sums + part * count + number);
    y[number] = rounded(total);
}
