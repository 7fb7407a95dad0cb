// mma_sp.cu as a function for a CPU: the launch of a whole grid.

#include "mma_sp.cu"

static struct {
    const void *weights, *positions, *columns, *pointers, *xt;
    void* y;
    long long tokens, row_width, panels, height, x_width, y_width;
} given;

static void call() {
    product((const Four*)given.weights, (const u32*)given.positions, (const u32*)given.columns, (const u32*)given.pointers,
            (const u16*)given.xt, (u16*)given.y, given.tokens, given.row_width, given.panels, given.height, given.x_width, given.y_width);
}

// ``arrays``: weights, positions, columns, pointers, xt, y; ``bytes``: their sizes; ``numbers``: the kernel's integers
extern "C" void launch(int programs, int shared_bytes, int copies_late, void** arrays, const long long* bytes, const long long* numbers) {
    given = {arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5],
             numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
    readable.clear();
    for (int array = 0; array < 5; array++)
        readable.push_back({(const char*)arrays[array], (const char*)arrays[array] + bytes[array]});
    late = copies_late;
    body = call;
    for (int program = 0; program < programs; program++)
        run_block(program, shared_bytes);
}
