// sums.cu as a function for a CPU.

#include "sums.cu"

static struct {
    const void* sums;
    void* y;
    long long parts, count;
} given;

static void call() { add_up((const float*)given.sums, (u16*)given.y, given.parts, given.count); }

extern "C" void launch(int programs, int shared_bytes, int, void** arrays, const long long* bytes, const long long* numbers) {
    given = {arrays[0], arrays[1], numbers[0], numbers[1]};
    readable = {{(const char*)arrays[0], (const char*)arrays[0] + bytes[0]}};
    body = call;
    for (int program = 0; program < programs; program++)
        run_block(program, shared_bytes);
}
