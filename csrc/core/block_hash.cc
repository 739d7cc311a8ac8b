#include "core/block_hash.h"

#include <bit>
#include <cstring>
#include <vector>

#include "core/blake3.h"
#include "core/check.h"
#include "core/sha256.h"

namespace kvstore {
namespace {

static_assert(std::endian::native == std::endian::little, "token ids are hashed as they lie");

constexpr std::size_t kHashBytes = sizeof(BlockHash);
constexpr char kBlake3RootName[] = "kvstore block hash chain 1";
constexpr char kVllmSeed[] = "vllm-none-hash";
constexpr std::uint8_t kExtraKeyMark = 0x01;

// CPython's Modules/_pickle.c: a frame is closed at the first object boundary past this size.
constexpr std::size_t kPickleFrameTarget = 64 * 1024;
constexpr std::size_t kPickleTokenBytesMax = 7;
// PROTO, a FRAME header, the parent's hash, MARK, TUPLE, MEMOIZE, TUPLE3, MEMOIZE, STOP.
constexpr std::size_t kPickleOtherBytes = 2 + 9 + (2 + kHashBytes + 1) + 3 + 3;

namespace pickle {
constexpr std::uint8_t kProto = 0x80, kFrame = 0x95, kMemoize = 0x94, kStop = '.', kNone = 'N',
                       kMark = '(', kTuple = 't', kTuple1 = 0x85, kTuple3 = 0x87, kBinInt = 'J',
                       kBinInt1 = 'K', kBinInt2 = 'M', kLong1 = 0x8a, kShortBinBytes = 'C',
                       kShortBinUnicode = 0x8c;
}  // namespace pickle

// Gives a block's token ids as u32: in place where they are 32 bits wide, through a buffer where
// not.
class BlockReader {
public:
    BlockReader(const TokenSpan &tokens, std::size_t block_tokens)
        : tokens_(tokens),
          block_tokens_(block_tokens),
          wide_(tokens.width == TokenSpan::Width::kInt64 ||
                tokens.width == TokenSpan::Width::kUint64),
          narrowed_(wide_ ? block_tokens : 0) {}

    // Valid until the next call.
    const std::uint32_t *Block(std::size_t index) {
        const std::size_t first = index * block_tokens_;
        if (!wide_) return static_cast<const std::uint32_t *>(tokens_.data) + first;
        const auto *ids = static_cast<const std::uint64_t *>(tokens_.data) + first;
        for (std::size_t i = 0; i < block_tokens_; ++i) {
            narrowed_[i] = static_cast<std::uint32_t>(ids[i]);
        }
        return narrowed_.data();
    }

private:
    const TokenSpan tokens_;
    const std::size_t block_tokens_;
    const bool wide_;
    std::vector<std::uint32_t> narrowed_;
};

// Writes one message after the other into one buffer.
class Message {
public:
    // Starts a message of at most `num_bytes_max`.
    void Start(std::size_t num_bytes_max) {
        if (buffer_.size() < num_bytes_max) buffer_.resize(num_bytes_max);
        end_ = buffer_.data();
    }
    void Byte(std::uint8_t byte) { *end_++ = byte; }
    void Bytes(const void *data, std::size_t num_bytes) {
        if (num_bytes > 0) std::memcpy(end_, data, num_bytes);
        end_ += num_bytes;
    }
    void LittleEndian(std::uint64_t value, std::size_t num_bytes) { Bytes(&value, num_bytes); }
    void BigEndian(std::uint64_t value, std::size_t num_bytes) {
        for (std::size_t i = num_bytes; i > 0; --i) {
            Byte(static_cast<std::uint8_t>(value >> (8 * (i - 1))));
        }
    }
    // Writes over bytes that are already there.
    void Patch(std::size_t offset, std::uint64_t value) {
        std::memcpy(buffer_.data() + offset, &value, sizeof(value));
    }
    const std::uint8_t *data() const { return buffer_.data(); }
    std::size_t size() const { return static_cast<std::size_t>(end_ - buffer_.data()); }

private:
    std::vector<std::uint8_t> buffer_;
    std::uint8_t *end_ = nullptr;
};

std::size_t TaggedBytesMax(std::size_t block_tokens, const ExtraKey &extra) {
    return kHashBytes + 4 * block_tokens + extra.num_bytes + 3 + 4 + 1;
}

// Appends message_i as block_hash.h defines it.
void AppendTagged(Message &message, const std::uint32_t *ids, std::size_t block_tokens,
                  const ExtraKey &extra) {
    message.Bytes(ids, 4 * block_tokens);
    if (extra.data == nullptr) return;
    message.Bytes(extra.data, extra.num_bytes);
    message.LittleEndian(0, (4 - extra.num_bytes % 4) % 4);
    message.LittleEndian(extra.num_bytes, 4);
    message.Byte(kExtraKeyMark);
}

// Appends what CPython's C pickler writes for (parent, ids, extra) under protocol 5:
// Modules/_pickle.c (save, save_long, store_tuple_elements, _Pickler_OpcodeBoundary).
class PickleWriter {
public:
    explicit PickleWriter(Message &message) : message_(message) {}

    void Write(const BlockHash &parent, const std::uint32_t *ids, std::size_t block_tokens,
               const ExtraKey &extra) {
        message_.Byte(pickle::kProto);
        message_.Byte(5);
        OpenFrame();
        message_.Byte(pickle::kShortBinBytes);
        message_.Byte(kHashBytes);
        message_.Bytes(parent.bytes, kHashBytes);
        message_.Byte(pickle::kMemoize);
        if (block_tokens > 3) AppendAfterBoundary(pickle::kMark);
        for (std::size_t i = 0; i < block_tokens; ++i) {
            Boundary();
            AppendInt(ids[i]);
        }
        message_.Byte(block_tokens > 3
                          ? pickle::kTuple
                          : static_cast<std::uint8_t>(pickle::kTuple1 + block_tokens - 1));
        message_.Byte(pickle::kMemoize);
        Boundary();
        if (extra.data == nullptr) {
            message_.Byte(pickle::kNone);
        } else {
            message_.Bytes(extra.data, extra.num_bytes);
        }
        message_.Byte(pickle::kTuple3);
        message_.Byte(pickle::kMemoize);
        message_.Byte(pickle::kStop);
        CloseFrame();
    }

private:
    void OpenFrame() {
        frame_ = message_.size();
        message_.Byte(pickle::kFrame);
        message_.LittleEndian(0, 8);
    }
    // Every frame here has the 4 bytes below which CPython drops the header: what follows the last
    // boundary is never shorter.
    void CloseFrame() { message_.Patch(frame_ + 1, message_.size() - frame_ - 9); }
    void Boundary() {
        if (message_.size() - frame_ - 9 < kPickleFrameTarget) return;
        CloseFrame();
        OpenFrame();
    }
    void AppendAfterBoundary(std::uint8_t opcode) {
        Boundary();
        message_.Byte(opcode);
    }
    void AppendInt(std::uint32_t id) {
        if (id <= 0xff) {
            message_.Byte(pickle::kBinInt1);
            message_.LittleEndian(id, 1);
        } else if (id <= 0xffff) {
            message_.Byte(pickle::kBinInt2);
            message_.LittleEndian(id, 2);
        } else if (id <= 0x7fffffff) {
            message_.Byte(pickle::kBinInt);
            message_.LittleEndian(id, 4);
        } else {
            message_.Byte(pickle::kLong1);
            message_.Byte(5);
            message_.LittleEndian(id, 5);
        }
    }

    Message &message_;
    std::size_t frame_ = 0;
};

std::size_t PickleBytesMax(std::size_t block_tokens, const ExtraKey &extra) {
    const std::size_t body =
        kPickleOtherBytes + kPickleTokenBytesMax * block_tokens + 1 + extra.num_bytes;
    return body + 9 * (body / kPickleFrameTarget);
}

// The head of a CBOR item: major type and its argument in the fewest bytes.
void AppendCborHead(Message &message, std::uint8_t major, std::uint32_t argument) {
    const auto type = static_cast<std::uint8_t>(major << 5);
    if (argument < 24) {
        message.Byte(static_cast<std::uint8_t>(type | argument));
    } else if (argument <= 0xff) {
        message.Byte(type | 24);
        message.BigEndian(argument, 1);
    } else if (argument <= 0xffff) {
        message.Byte(type | 25);
        message.BigEndian(argument, 2);
    } else {
        message.Byte(type | 26);
        message.BigEndian(argument, 4);
    }
}

void AppendCbor(Message &message, const BlockHash &parent, const std::uint32_t *ids,
                std::size_t block_tokens, const ExtraKey &extra) {
    constexpr std::uint8_t kUnsigned = 0, kByteString = 2, kArray = 4, kNull = 0xf6;
    AppendCborHead(message, kArray, 3);
    AppendCborHead(message, kByteString, kHashBytes);
    message.Bytes(parent.bytes, kHashBytes);
    AppendCborHead(message, kArray, static_cast<std::uint32_t>(block_tokens));
    for (std::size_t i = 0; i < block_tokens; ++i) AppendCborHead(message, kUnsigned, ids[i]);
    if (extra.data == nullptr) {
        message.Byte(kNull);
    } else {
        message.Bytes(extra.data, extra.num_bytes);
    }
}

std::size_t CborBytesMax(std::size_t block_tokens, const ExtraKey &extra) {
    return 1 + 2 + kHashBytes + 5 + 5 * block_tokens + 1 + extra.num_bytes;
}

// What every chain is given.
struct Blocks {
    const TokenSpan &tokens;
    std::size_t block_tokens;
    std::span<const ExtraKey> extra_keys;

    std::size_t count() const { return tokens.count / block_tokens; }
    ExtraKey extra(std::size_t index) const {
        return extra_keys.empty() ? ExtraKey{} : extra_keys[index];
    }
};

void HashBlake3(const Blocks &blocks, BlockHash key, BlockHash *out) {
    const Blake3Compress compress = PickBlake3Compress();
    constexpr std::uint32_t kWholeMessage =
        kBlake3KeyedHash | kBlake3ChunkStart | kBlake3ChunkEnd | kBlake3Root;
    BlockReader reader(blocks.tokens, blocks.block_tokens);
    Message message;
    const std::size_t ids_bytes = 4 * blocks.block_tokens;
    std::uint32_t chaining[8];
    for (std::size_t i = 0; i < blocks.count(); ++i) {
        const std::uint32_t *ids = reader.Block(i);
        const ExtraKey extra = blocks.extra(i);
        if (extra.data != nullptr) {
            message.Start(TaggedBytesMax(blocks.block_tokens, extra));
            AppendTagged(message, ids, blocks.block_tokens, extra);
            Blake3(compress, message.data(), message.size(), key.bytes, key.bytes);
        } else if (ids_bytes == kBlake3BlockBytes) {
            std::memcpy(chaining, key.bytes, kHashBytes);
            compress(chaining, reinterpret_cast<const std::uint8_t *>(ids), 0, kBlake3BlockBytes,
                     kWholeMessage, chaining);
            std::memcpy(key.bytes, chaining, kHashBytes);
        } else {
            Blake3(compress, reinterpret_cast<const std::uint8_t *>(ids), ids_bytes, key.bytes,
                   key.bytes);
        }
        out[i] = key;
    }
}

void HashSha256(const Blocks &blocks, const BlockHash *parent, BlockHash *out) {
    const Sha256Compress compress = PickSha256Compress();
    BlockReader reader(blocks.tokens, blocks.block_tokens);
    Message message;
    for (std::size_t i = 0; i < blocks.count(); ++i) {
        const ExtraKey extra = blocks.extra(i);
        message.Start(TaggedBytesMax(blocks.block_tokens, extra));
        if (parent != nullptr) message.Bytes(parent->bytes, kHashBytes);
        AppendTagged(message, reader.Block(i), blocks.block_tokens, extra);
        Sha256(compress, message.data(), message.size(), out[i].bytes);
        parent = &out[i];
    }
}

void HashVllm(HashChain chain, const Blocks &blocks, BlockHash parent, BlockHash *out) {
    const Sha256Compress compress = PickSha256Compress();
    BlockReader reader(blocks.tokens, blocks.block_tokens);
    Message message;
    for (std::size_t i = 0; i < blocks.count(); ++i) {
        const ExtraKey extra = blocks.extra(i);
        if (chain == HashChain::kVllmSha256) {
            message.Start(PickleBytesMax(blocks.block_tokens, extra));
            PickleWriter(message).Write(parent, reader.Block(i), blocks.block_tokens, extra);
        } else {
            message.Start(CborBytesMax(blocks.block_tokens, extra));
            AppendCbor(message, parent, reader.Block(i), blocks.block_tokens, extra);
        }
        Sha256(compress, message.data(), message.size(), parent.bytes);
        out[i] = parent;
    }
}

template <typename Id>
std::size_t FirstBadId(const void *data, std::size_t count) {
    const auto *ids = static_cast<const Id *>(data);
    const auto is_bad = [](Id id) {
        return sizeof(Id) == 8 ? (static_cast<std::uint64_t>(id) >> 32) != 0
                               : static_cast<std::int64_t>(id) < 0;
    };
    // A bad id is an error of the caller, so first look for any, which vectorises.
    bool any = false;
    for (std::size_t i = 0; i < count; ++i) any |= is_bad(ids[i]);
    if (!any) return count;
    for (std::size_t i = 0; i < count; ++i) {
        if (is_bad(ids[i])) return i;
    }
    return count;
}

}  // namespace

std::size_t VllmExtraKeyBytesMax(std::size_t block_tokens) {
    const std::size_t others = kPickleOtherBytes + kPickleTokenBytesMax * block_tokens;
    return others >= kPickleFrameTarget ? 0 : kPickleFrameTarget - others;
}

std::size_t FirstBadToken(const TokenSpan &tokens) {
    switch (tokens.width) {
        case TokenSpan::Width::kUint32:
            return tokens.count;
        case TokenSpan::Width::kInt32:
            return FirstBadId<std::int32_t>(tokens.data, tokens.count);
        case TokenSpan::Width::kInt64:
        case TokenSpan::Width::kUint64:
            return FirstBadId<std::uint64_t>(tokens.data, tokens.count);
    }
    KV_CHECK(false);
}

BlockHash ChainRoot(HashChain chain) {
    BlockHash root = {};
    Message message;
    message.Start(64);
    switch (chain) {
        case HashChain::kBlake3:
            Blake3(PickBlake3Compress(), reinterpret_cast<const std::uint8_t *>(kBlake3RootName),
                   sizeof(kBlake3RootName) - 1, nullptr, root.bytes);
            return root;
        case HashChain::kSha256:
            return root;
        case HashChain::kVllmSha256:
            message.Byte(pickle::kProto);
            message.Byte(5);
            message.Byte(pickle::kFrame);
            message.LittleEndian(2 + sizeof(kVllmSeed) - 1 + 2, 8);
            message.Byte(pickle::kShortBinUnicode);
            message.Byte(sizeof(kVllmSeed) - 1);
            message.Bytes(kVllmSeed, sizeof(kVllmSeed) - 1);
            message.Byte(pickle::kMemoize);
            message.Byte(pickle::kStop);
            break;
        case HashChain::kVllmSha256Cbor:
            AppendCborHead(message, 3, sizeof(kVllmSeed) - 1);
            message.Bytes(kVllmSeed, sizeof(kVllmSeed) - 1);
            break;
    }
    Sha256(PickSha256Compress(), message.data(), message.size(), root.bytes);
    return root;
}

void HashBlocks(HashChain chain, const TokenSpan &tokens, std::size_t block_tokens,
                const BlockHash *parent, std::span<const ExtraKey> extra_keys, BlockHash *out) {
    KV_CHECK(block_tokens > 0 && block_tokens <= UINT32_MAX);
    const Blocks blocks{tokens, block_tokens, extra_keys};
    KV_CHECK(extra_keys.empty() || extra_keys.size() == blocks.count());
    if (blocks.count() == 0) return;
    if (chain == HashChain::kSha256) return HashSha256(blocks, parent, out);
    const BlockHash before = parent != nullptr ? *parent : ChainRoot(chain);
    if (chain == HashChain::kBlake3) return HashBlake3(blocks, before, out);
    HashVllm(chain, blocks, before, out);
}

}  // namespace kvstore
