// Keys and values of all layers, for a number of sequences.
#pragma once

#include <cstdlib>
#include <memory>
#include <span>

#include "kernels.h"

namespace hopskip {

class Cache {
public:
    Cache(CacheType type, int layers, int slots, int kv_heads, int length, int head_dim);  // std::bad_alloc

    const CacheLayout& layout() const { return layout_; }
    int layers() const { return layers_; }
    int slots() const { return slots_; }
    int kv_heads() const { return kv_heads_; }
    int length() const { return length_; }  // positions of a slot
    uint8_t* data() { return data_; }
    size_t bytes() const { return bytes_; }

    // Blocks of one head, from position 0 on.
    uint8_t* keys(int layer, int slot, int kv_head) {
        return data_ + ((static_cast<ptrdiff_t>(layer) * slots_ + slot) * kv_heads_ + kv_head) * head_bytes_;
    }
    uint8_t* values(int layer, int slot, int kv_head) {
        return keys(layer, slot, kv_head) + num_blocks_ * layout_.key_block_bytes();
    }

    // Writes a key or value, f32 [head_dim, padded with zeros to a multiple of 32], to a place of a head.
    void store_key(uint8_t* keys, int place, const float* key, const Kernels& kernels) const;
    void store_value(uint8_t* values, int place, const float* value, const Kernels& kernels) const;

    void copy_prefix(int source, int target, int length);
    void keep_path(int slot, int start, std::span<const int32_t> rows);  // see Cache.keep_path in backends/rows.py
    void copy_from(Cache& smaller);
    void clear();

private:
    template <class Use>
    void for_heads(int slot, const Use& use);  // use(layer, head, keys, values)
    void move(uint8_t* keys, uint8_t* values, int from, int to) const;

    CacheLayout layout_;
    int layers_, slots_, kv_heads_, length_;
    ptrdiff_t num_blocks_, head_bytes_;
    size_t bytes_;
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    uint8_t* data_;  // in it, aligned
};

}  // namespace hopskip
