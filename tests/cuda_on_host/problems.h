// What a driver does with its problems: each in several orders of execution, with the same results bit by bit.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "arrays.h"

// What the launchers left of a problem, array by array.
template <class BLOCK, class PROBLEM>
std::vector<std::vector<char>> results(const PROBLEM& problem, std::vector<std::string>& names) {
    BLOCK block(problem);
    std::vector<std::vector<char>> contents;
    names.clear();
    for (Array& array : block.arrays()) {
        array.check();
        names.push_back(array.name());
        contents.push_back(array.contents());
    }
    return contents;
}

template <class BLOCK, class PROBLEM>
void run_problem(const PROBLEM& problem, int runs) {
    std::vector<std::vector<char>> first;
    for (int i = 0; i < runs; ++i) {
        cuda_on_host_configure(i, i % 3, cuda_on_host::Settings{}.shared_limit);  // the three of Landing
        std::vector<std::string> names;
        const auto now = results<BLOCK>(problem, names);
        if (first.empty()) first = now;
        for (size_t k = 0; k < names.size(); ++k) {
            if (now[k] != first[k]) throw std::runtime_error(names[k] + " changes with the order of execution");
        }
    }
}

// main: each problem as often as the first argument says.
template <class BLOCK, class PROBLEMS>
int run_problems(const PROBLEMS& problems, int argc, char** argv) {
    const int runs = argc > 1 ? std::atoi(argv[1]) : 3;
    for (const auto& problem : problems) {
        try {
            run_problem<BLOCK>(problem, runs);
        } catch (const std::exception& error) {
            std::printf("%s: %s\n", problem.name, error.what());
            return 1;
        }
        std::printf("%s: ok\n", problem.name);
    }
    return 0;
}
