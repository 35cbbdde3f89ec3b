#include "cache.h"

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>

namespace hopskip {

namespace {

constexpr size_t ALIGNMENT = 64;

// Throws std::bad_alloc if there is no such number.
size_t product_of(std::initializer_list<ptrdiff_t> sizes) {
    size_t product = 1;
    for (ptrdiff_t size : sizes)
        if (__builtin_mul_overflow(product, size, &product)) throw std::bad_alloc();
    if (product > SIZE_MAX / 2) throw std::bad_alloc();
    return product;
}

int blocks_for(int positions) { return (positions + TILE - 1) / TILE; }

}  // namespace

Cache::Cache(CacheType type, int layers, int slots, int kv_heads, int length, int head_dim)
    : layout_{type, head_dim}, layers_(layers), slots_(slots), kv_heads_(kv_heads), length_(length),
      num_blocks_(blocks_for(length)),
      head_bytes_(num_blocks_ * (layout_.key_block_bytes() + layout_.value_block_bytes())),
      bytes_(product_of({head_bytes_, layers, slots, kv_heads})),
      // The system commits a page of it, of zeros, when it is first written.
      memory_(std::calloc(bytes_ + ALIGNMENT, 1)) {
    if (!memory_) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<uint8_t*>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

namespace {

// A vector in the cache's type; the scale of int8.
struct Narrow {
    alignas(64) uint8_t bytes[MAX_HEAD_DIM * 4];
    float scale;

    Narrow(const CacheLayout& layout, const float* x, const Kernels& kernels) {
        const auto size = static_cast<int>(padded(layout.head_dim));
        switch (layout.type) {
            case CacheType::f32: std::memcpy(bytes, x, size * sizeof(float)); break;
            case CacheType::bf16: kernels.to_bf16(x, size, reinterpret_cast<uint16_t*>(bytes)); break;
            case CacheType::int8: scale = kernels.to_int8(x, size, reinterpret_cast<int8_t*>(bytes)); break;
        }
    }
};

template <int SIZE>
void put_elements(const CacheLayout& layout, int lane, const uint8_t* from, uint8_t* block) {
    for (int strip = 0, e = 0; strip < layout.value_strips(); ++strip) {
        uint8_t* to = block + layout.value_offset(lane, strip * TILE);
        for (int i = 0; i < TILE; ++i, ++e) std::memcpy(to + i * 4, from + e * SIZE, SIZE);
    }
}

}  // namespace

void Cache::store_key(uint8_t* keys, int place, const float* key, const Kernels& kernels) const {
    Narrow narrow(layout_, key, kernels);
    uint8_t* block = keys + place / TILE * layout_.key_block_bytes();
    const int lane = place % TILE;
    if (layout_.type == CacheType::int8) {
        std::memcpy(block + lane * 4, &narrow.scale, 4);
        for (int e = 0; e < layout_.key_units() * 4; ++e) narrow.bytes[e] ^= 0x80;  // plus 128
    }
    uint8_t* to = block + layout_.key_offset(lane, 0);
    for (int unit = 0; unit < layout_.key_units(); ++unit)
        std::memcpy(to + unit * UNIT_BYTES, narrow.bytes + unit * 4, 4);
}

void Cache::store_value(uint8_t* values, int place, const float* value, const Kernels& kernels) const {
    const Narrow narrow(layout_, value, kernels);
    uint8_t* block = values + place / TILE * layout_.value_block_bytes();
    const int lane = place % TILE;
    switch (layout_.type) {
        case CacheType::f32: return put_elements<4>(layout_, lane, narrow.bytes, block);
        case CacheType::bf16: return put_elements<2>(layout_, lane, narrow.bytes, block);
        case CacheType::int8:
            std::memcpy(block + lane * 4, &narrow.scale, 4);
            return put_elements<1>(layout_, lane, narrow.bytes, block);
    }
}

template <class Use>
void Cache::for_heads(int slot, const Use& use) {
    for (int layer = 0; layer < layers_; ++layer)
        for (int head = 0; head < kv_heads_; ++head)
            use(layer, head, keys(layer, slot, head), values(layer, slot, head));
}

// Whole blocks: what a slot holds behind its length is not valid.
void Cache::copy_prefix(int source, int target, int length) {
    const int blocks = blocks_for(length);
    for_heads(target, [&](int layer, int head, uint8_t* to_keys, uint8_t* to_values) {
        std::memcpy(to_keys, keys(layer, source, head), blocks * layout_.key_block_bytes());
        std::memcpy(to_values, values(layer, source, head), blocks * layout_.value_block_bytes());
    });
}

void Cache::copy_from(Cache& smaller) {
    for (int slot = 0; slot < smaller.slots_; ++slot)
        for_heads(slot, [&](int layer, int head, uint8_t* to_keys, uint8_t* to_values) {
            const ptrdiff_t blocks = smaller.num_blocks_;
            std::memcpy(to_keys, smaller.keys(layer, slot, head), blocks * layout_.key_block_bytes());
            std::memcpy(to_values, smaller.values(layer, slot, head), blocks * layout_.value_block_bytes());
        });
}

void Cache::move(uint8_t* keys, uint8_t* values, int from, int to) const {
    const CacheLayout& layout = layout_;
    const uint8_t *key = keys + from / TILE * layout.key_block_bytes(),
                  *value = values + from / TILE * layout.value_block_bytes();
    uint8_t *to_key = keys + to / TILE * layout.key_block_bytes(),
            *to_value = values + to / TILE * layout.value_block_bytes();
    const int lane = from % TILE, to_lane = to % TILE;
    if (layout.header_bytes()) {
        std::memcpy(to_key + to_lane * 4, key + lane * 4, 4);
        std::memcpy(to_value + to_lane * 4, value + lane * 4, 4);
    }
    for (int e = 0; e < layout.head_dim; e += layout.per_unit())
        std::memcpy(to_key + layout.key_offset(to_lane, e), key + layout.key_offset(lane, e), 4);
    for (int e = 0; e < layout.head_dim; ++e)
        std::memcpy(to_value + layout.value_offset(to_lane, e), value + layout.value_offset(lane, e),
                    layout.element_size());
}

// Rows move to earlier places, in their order: none is overwritten before it has moved.
void Cache::keep_path(int slot, int start, std::span<const int32_t> rows) {
    for_heads(slot, [&](int, int, uint8_t* keys, uint8_t* values) {
        for (int i = 0; i < static_cast<int>(rows.size()); ++i)
            if (rows[i] != i) move(keys, values, start + rows[i], start + i);
    });
}

void Cache::clear() { std::memset(data_, 0, bytes_); }

}  // namespace hopskip
