// SPDX-License-Identifier: Apache-2.0
// Switches that tests/cuda_mutations.py puts into copies of the kernels: one executable holds every mutation, and
// SK_MUTATION in the environment says which is on. 0, or a constant expression: none.
#pragma once

#include <cstdlib>
#include <type_traits>

namespace sktest {

inline const int chosen_mutation = std::getenv("SK_MUTATION") ? std::atoi(std::getenv("SK_MUTATION")) : 0;

constexpr bool mutated(int number) {
    return !__builtin_is_constant_evaluated() && chosen_mutation == number;
}

// `a + b` becomes `a +Operator<'+'>{number}+ b`: the same precedence, and what is computed is decided when it runs.
template <char symbol> struct Operator {
    int number;
};
template <char symbol, class T> struct Pending {
    T left;
    int number;
};

// Whether what stands in for it has a meaning.
template <char symbol, class T, class U> constexpr bool possible() {
    constexpr bool integers = std::is_integral<T>::value && std::is_integral<U>::value;
    constexpr bool numbers = std::is_arithmetic<T>::value && std::is_arithmetic<U>::value;
    switch (symbol) {
    case '+':
    case '-':
        return numbers || (std::is_pointer<T>::value && std::is_integral<U>::value);
    case '*':
        return numbers;
    case '<':
    case '>':
    case 'L':
    case 'G':
    case '=':
    case '!':
        return numbers || std::is_enum<T>::value || std::is_pointer<T>::value;
    default:
        return integers;
    }
}

#define SKTEST_OPERATOR(symbol, sign, instead)                                                                         \
    template <class T> constexpr Pending<symbol, T> operator sign(T left, Operator<symbol> op) {                       \
        return {left, op.number};                                                                                      \
    }                                                                                                                  \
    template <class T, class U>                                                                                        \
    constexpr auto operator sign(Pending<symbol, T> held, U right)->decltype(held.left sign right) {                   \
        using Result = decltype(held.left sign right);                                                                 \
        if constexpr (possible<symbol, T, U>()) {                                                                      \
            if (mutated(held.number)) return static_cast<Result>(held.left instead right);                             \
        }                                                                                                              \
        return held.left sign right;                                                                                   \
    }
SKTEST_OPERATOR('+', +, -)
SKTEST_OPERATOR('-', -, +)
SKTEST_OPERATOR('*', *, +)
SKTEST_OPERATOR('/', /, %)
SKTEST_OPERATOR('%', %, /)
SKTEST_OPERATOR('&', &, |)
SKTEST_OPERATOR('|', |, &)
SKTEST_OPERATOR('^', ^, |)
SKTEST_OPERATOR('l', <<, >>)
SKTEST_OPERATOR('r', >>, <<)
SKTEST_OPERATOR('<', <, <=)
SKTEST_OPERATOR('>', >, >=)
SKTEST_OPERATOR('L', <=, <)
SKTEST_OPERATOR('G', >=, >)
SKTEST_OPERATOR('=', ==, !=)
SKTEST_OPERATOR('!', !=, ==)
#undef SKTEST_OPERATOR

}  // namespace sktest
