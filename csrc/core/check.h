// Assertions that stay on in release builds.
//
// They guard against our own mistakes, never against bad input: arguments are checked, and turned
// into exceptions, in csrc/python.
#pragma once

#include <cstdio>
#include <cstdlib>

#define KV_CHECK(condition)                                                                \
    do {                                                                                   \
        if (__builtin_expect(!(condition), 0)) {                                           \
            std::fprintf(stderr, "kvstore: %s:%d: check failed: %s\n", __FILE__, __LINE__, \
                         #condition);                                                      \
            std::abort();                                                                  \
        }                                                                                  \
    } while (0)
