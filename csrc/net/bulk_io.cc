#include "net/bulk_io.h"

#include <sys/socket.h>

#include <algorithm>
#include <memory>

#include "copy/copy.h"
#include "core/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvstore {

namespace {

constexpr std::size_t kPartsMax = 64;
constexpr std::size_t kDiscardBytes = 64 << 10;

}  // namespace

void CpuPause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// --- sending

void OutgoingParts::Clear() {
    parts_.clear();
    first_ = 0;
}

void OutgoingParts::Add(const void *data, std::uint64_t bytes) {
    if (empty()) Clear();
    added_bytes_ += bytes;
    if (bytes > 0) parts_.push_back({const_cast<void *>(data), static_cast<std::size_t>(bytes)});
}

ssize_t OutgoingParts::SendSome(int fd, std::size_t bytes_max) {
    std::size_t n = 0;
    std::size_t asked = 0;
    while (n < kPartsMax && first_ + n < parts_.size() && asked < bytes_max) {
        asked += parts_[first_ + n++].iov_len;
    }
    iovec &last = parts_[first_ + n - 1];
    const std::size_t beyond = asked > bytes_max ? asked - bytes_max : 0;
    last.iov_len -= beyond;
    msghdr message{};
    message.msg_iov = parts_.data() + first_;
    message.msg_iovlen = n;
    const ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    last.iov_len += beyond;
    if (sent > 0) sent_bytes_ += static_cast<std::uint64_t>(sent);
    for (std::size_t left = sent > 0 ? static_cast<std::size_t>(sent) : 0; left > 0;) {
        iovec &part = parts_[first_];
        const std::size_t taken = std::min(left, part.iov_len);
        part.iov_base = static_cast<std::uint8_t *>(part.iov_base) + taken;
        part.iov_len -= taken;
        left -= taken;
        if (part.iov_len == 0) ++first_;
    }
    return sent;
}

// --- receiving

void IncomingPieces::Clear() {
    pieces_.clear();
    at_ = 0;
    received_ = 0;
    stream_.reset();
}

void IncomingPieces::Add(std::uint8_t *to, std::uint64_t bytes, const std::uint64_t *sum) {
    const bool checked = sum != nullptr && to != nullptr;
    pieces_.push_back({to, bytes, checked ? *sum : 0, checked, false});
    SkipEmpty();
}

ssize_t IncomingPieces::ReceiveSome(int fd, std::size_t bytes_max) {
    iovec parts[kPartsMax];
    msghdr message{};
    message.msg_iov = parts;
    if (pieces_[at_].to == nullptr) {
        thread_local const std::unique_ptr<std::uint8_t[]> sink(new std::uint8_t[kDiscardBytes]);
        const std::uint64_t left = pieces_[at_].bytes - received_;
        parts[0] = {sink.get(), static_cast<std::size_t>(
                                    std::min<std::uint64_t>({left, kDiscardBytes, bytes_max}))};
        message.msg_iovlen = 1;
    } else {
        std::size_t asked = 0;
        std::uint64_t skipped = received_;
        std::size_t n = 0;
        for (std::size_t i = at_; i < pieces_.size() && n < kPartsMax && asked < bytes_max; ++i) {
            const Piece &piece = pieces_[i];
            if (piece.to == nullptr) break;
            const auto bytes = static_cast<std::size_t>(
                std::min<std::uint64_t>(piece.bytes - skipped, bytes_max - asked));
            if (bytes > 0) parts[n++] = {piece.to + skipped, bytes};
            asked += bytes;
            skipped = 0;
        }
        message.msg_iovlen = n;
    }
    const ssize_t received = recvmsg(fd, &message, MSG_DONTWAIT);
    if (received > 0) Advance(static_cast<std::size_t>(received));
    return received;
}

void IncomingPieces::Advance(std::size_t bytes) {
    while (bytes > 0) {
        Piece &piece = pieces_[at_];
        const auto taken =
            static_cast<std::size_t>(std::min<std::uint64_t>(bytes, piece.bytes - received_));
        received_ += taken;
        bytes -= taken;
        if (received_ == piece.bytes) {
            EndPiece();
            SkipEmpty();
        } else if (piece.has_sum && piece.bytes > kXxh3ShortBytes) {
            Hash(received_ / kStripeBytes * kStripeBytes);
        }
    }
}

// Up to `done` bytes of the piece.
void IncomingPieces::Hash(std::uint64_t done) {
    const Piece &piece = pieces_[at_];
    if (!stream_.has_value()) stream_.emplace(piece.bytes);
    const std::uint64_t before = stream_->bytes_done();
    if (done > before) {
        stream_->Update(piece.to + before, static_cast<std::size_t>(done - before));
    }
}

void IncomingPieces::EndPiece() {
    Piece &piece = pieces_[at_];
    if (piece.has_sum) {
        std::uint64_t sum;
        if (piece.bytes > kXxh3ShortBytes) {
            Hash(piece.bytes);
            sum = stream_->Finish(piece.to + piece.bytes - kStripeBytes);
        } else {
            sum = Xxh3(piece.to, static_cast<std::size_t>(piece.bytes));
        }
        piece.damaged = sum != piece.sum;
    }
    stream_.reset();
    received_ = 0;
    ++at_;
}

void IncomingPieces::SkipEmpty() {
    while (at_ < pieces_.size() && pieces_[at_].bytes == 0) EndPiece();
}

}  // namespace kvstore
