// One binary for every x86-64 generation.
#pragma once

// A function so marked is compiled once for each instruction set, and the machine's best is picked at load time. It
// works on plain functions only, and what they call must be UNILORA_INLINE to be compiled along with them.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define UNILORA_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define UNILORA_MULTIVERSION
#endif
#define UNILORA_INLINE inline __attribute__((always_inline))
