// SPDX-License-Identifier: Apache-2.0
// Runs a kernel on a case under several schedules and judges it: no problem seen by the emulation, guard zones intact,
// the right results, and the same bits whatever the schedule.
//   Tally tally(argc, argv);
//   for_each_fixture(tally, "streamed", linear_cases(), [&](const Fixture &f, const std::string &test) {
//       check_product(f, Step::forward, test, tally, [&](auto... given) {
//           streamed(f.problem, Step::forward, plan, given..., Stream{});
//       });
//   });
//   return tally.finish();
#pragma once

#include <exception>

#include "cases.h"
#include "options.h"

namespace sktest {

constexpr Dtype kDtypes[] = {Dtype::bfloat16, Dtype::float16, Dtype::tf32};

// Calls visit(fixture, name of the test) for each case in each dtype that the tally wants.
template <class Visit>
void for_each_fixture(Tally &tally, const std::string &family, const std::vector<Case> &cases, Visit visit) {
    for (const Case &a : cases)
        for (const Dtype dtype : kDtypes) {
            const std::string test = family + " " + name_of(dtype);
            if (tally.wants(test)) visit(Fixture(a, dtype), test);
        }
}

struct Setting {
    emulation::Schedule schedule;
    emulation::Copies copies;
    uint64_t seed;

    std::string text() const {
        static const char *const schedules[] = {"forward", "reverse", "random"}, *const when[] = {"early", "late",
                                                                                                  "random"};
        return std::string(schedules[int(schedule)]) + " schedule, " + when[int(copies)] + " copies, seed " +
               std::to_string(seed);
    }
};

// Each schedule and each time of copies once; all pairs where the tally wants everything.
inline std::vector<Setting> settings(bool everything, uint64_t seed) {
    using emulation::Copies;
    using emulation::Schedule;
    if (!everything) {
        return {{Schedule::forward, Copies::late, 1},
                {Schedule::reverse, Copies::early, 1},
                {Schedule::random, Copies::random, seed}};
    }
    std::vector<Setting> all;
    for (const Schedule schedule : {Schedule::forward, Schedule::reverse, Schedule::random})
        for (const Copies copies : {Copies::early, Copies::late, Copies::random})
            all.push_back({schedule, copies, seed});
    return all;
}

// One array that a kernel writes, and what it must hold.
struct Expected {
    const char *name;
    int64_t size;
    Sums sums;
};

// Calls launch(array of results) under each setting and reports to the tally under `test`.
template <class Launch>
void check(const Fixture &fixture, const std::string &test, Tally &tally, const std::vector<Expected> &expected,
           Launch launch) {
    std::vector<Array> first;
    for (const Setting &setting : settings(tally.everything(), fixture.about.seed_)) {
        const std::string what = fixture.text() + " (" + setting.text() + "): ";
        std::vector<Array> results;
        for (const Expected &e : expected) results.emplace_back(e.size, fixture.bytes());
        emulation::reset();
        emulation::options().schedule = setting.schedule;
        emulation::options().copies = setting.copies;
        emulation::options().seed = setting.seed;
        try {
            launch(results);
        } catch (const std::exception &error) {
            tally.report(false, test, what + "threw " + error.what());
            return;
        }
        const std::vector<std::string> &problems = emulation::problems();
        tally.report(problems.empty(), test, what + (problems.empty() ? "" : problems.front()));
        for (size_t i = 0; i < expected.size(); ++i) {
            tally.report(results[i].guards_intact(), test, what + "wrote outside " + expected[i].name);
            if (first.empty()) {
                const std::string wrong = compare(fixture, expected[i].name, results[i], expected[i].sums);
                tally.report(wrong.empty(), test, what + wrong);
            } else {
                const int64_t at = first[i].first_difference(results[i]);
                tally.report(at < 0, test,
                             what + expected[i].name + "[" + std::to_string(at) +
                                 "] differs from the first schedule's");
            }
        }
        if (first.empty()) first = std::move(results);
    }
}

// Forward or dgrad. launch(source, source_ld, values, index, bias or null, result)
template <class Launch>
void check_product(const Fixture &f, Step step, const std::string &test, Tally &tally, Launch launch) {
    const bool forward = step == Step::forward;
    Sums sums =
        forward ? reference_forward(f.problem, f.operands, f.about.bias) : reference_dgrad(f.problem, f.operands);
    const int64_t size = forward ? f.pixels_y() * f.problem.o : f.pixels_x() * f.problem.c;
    check(f, test + (forward ? " forward" : " dgrad"), tally, {{forward ? "y" : "dx", size, std::move(sums)}},
          [&](std::vector<Array> &results) {
              launch((forward ? f.x : f.dy).data(), forward ? f.x_ld : f.dy_ld, f.values.data(), f.index.as<int32_t>(),
                     forward && f.about.bias ? f.bias.data() : nullptr, results[0].data());
          });
}

// wgrad. launch(dy, dy_ld, x, x_ld, index, mask or null, workspace, dvalues, dbias or null)
template <class Launch>
void check_wgrad(const Fixture &f, int64_t workspace_bytes, const std::string &test, Tally &tally, Launch launch) {
    std::vector<Expected> expected;
    expected.push_back({"dvalues", f.values.size(), f.dvalues(f.about.mask)});
    if (f.about.bias) expected.push_back({"dbias", f.problem.o, reference_dbias(f.problem, f.operands)});
    check(f, test + " wgrad", tally, expected, [&](std::vector<Array> &results) {
        Array workspace((workspace_bytes + 3) / 4, 4);
        launch(f.dy.data(), f.dy_ld, f.x.data(), f.x_ld, f.index.as<int32_t>(),
               f.about.mask ? f.mask.as<uint8_t>() : nullptr, workspace_bytes ? workspace.data() : nullptr,
               results[0].data(), f.about.bias ? results[1].data() : nullptr);
        tally.report(workspace.guards_intact(), test + " wgrad", f.text() + ": wrote outside the workspace");
    });
}

}  // namespace sktest
