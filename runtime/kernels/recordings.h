// What operators did in Python, and how it is done again (repeat.cpp).

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

void check(AOTITorchError error, const char* what) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("qcompiler: torch cannot ") + what);
}

struct Delete {
    void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using Tensor = std::unique_ptr<AtenTensorOpaque, Delete>;

// Memory that is asked for: of a result, or of a kernel.
struct Made {
    std::vector<int64_t> size, stride;
    int32_t dtype = 0;
    int64_t first = -1, last = -1;  // the first and the last call that need the memory; -1: a result
};

// Where an address is written: into a structure, at an offset, or as an argument (offset -1).
struct Place {
    int64_t argument, offset, tensor, shift;  // tensors: those of the arguments, then those that are made
};

constexpr int MOST_ARGUMENTS = 4;
using Kernel = void (*)(int64_t, int64_t, int64_t, int64_t);  // an argument that a kernel lacks changes nothing

struct Call {
    Kernel kernel;
    std::vector<char> structures;
    int64_t count = 0;
    int64_t arguments[MOST_ARGUMENTS] = {};  // a number, or where a structure starts
    bool is_structure[MOST_ARGUMENTS] = {};
    std::vector<Place> places;
};

// What is known of a kind of arguments.
enum class State { once, python, repeats };

struct Recording {
    State state = State::once;  // the operator ran in Python once; does so every time; is repeated
    std::vector<Made> made;
    std::vector<Call> calls;
    std::vector<int64_t> results;
};

// Recordings by what is the same from call to call.
class Memory {
  public:
    std::shared_ptr<const Recording> find(const std::string& key) {
        std::lock_guard<std::mutex> held(lock);
        auto found = recordings.find(key);
        return found == recordings.end() ? nullptr : found->second;
    }

    void keep(const std::string& key, Recording&& made) {
        std::lock_guard<std::mutex> held(lock);
        if (recordings.size() >= MOST) recordings.clear();  // shapes that change with every step
        recordings[key] = std::make_shared<const Recording>(std::move(made));
    }

    void forget() {
        std::lock_guard<std::mutex> held(lock);
        recordings.clear();
    }

    int64_t count() {
        std::lock_guard<std::mutex> held(lock);
        int64_t repeats = 0;
        for (const auto& [key, recording] : recordings) repeats += recording->state == State::repeats;
        return repeats;
    }

  private:
    static constexpr size_t MOST = 4096;
    std::mutex lock;
    std::unordered_map<std::string, std::shared_ptr<const Recording>> recordings;
};

Memory& memory() {
    static Memory* kept = new Memory;  // never freed: threads may call operators while the process ends
    return *kept;
}

char* get_address(AtenTensorHandle tensor) {
    void* address = nullptr;
    check(aoti_torch_get_data_ptr(tensor, &address), "read an address");
    return static_cast<char*>(address);
}

Tensor make(const Made& made) {
    AtenTensorHandle tensor = nullptr;
    auto dims = static_cast<int64_t>(made.size.size());
    auto error = aoti_torch_empty_strided(
        dims, made.size.data(), made.stride.data(), made.dtype, aoti_torch_device_type_cpu(), 0, &tensor);
    check(error, "find memory");
    return Tensor(tensor);
}

void run_call(const Call& call, const std::vector<char*>& addresses) {
    alignas(16) char structures[2048];
    std::memcpy(structures, call.structures.data(), call.structures.size());
    int64_t given[MOST_ARGUMENTS] = {};
    for (int64_t place = 0; place < call.count; ++place)
        given[place] = call.arguments[place] + (call.is_structure[place] ? reinterpret_cast<int64_t>(structures) : 0);
    for (const Place& place : call.places) {
        auto address = reinterpret_cast<int64_t>(addresses[place.tensor] + place.shift);
        if (place.offset < 0)
            given[place.argument] = address;
        else
            std::memcpy(reinterpret_cast<char*>(given[place.argument]) + place.offset, &address, sizeof address);
    }
    call.kernel(given[0], given[1], given[2], given[3]);
}

// Return the results, in the order of the operator.
std::vector<Tensor> repeat(const Recording& recording, const std::vector<AtenTensorHandle>& tensors) {
    std::vector<char*> addresses(tensors.size() + recording.made.size());
    std::vector<Tensor> made(recording.made.size());
    for (size_t place = 0; place < tensors.size(); ++place) addresses[place] = get_address(tensors[place]);
    auto make_for = [&](int64_t index) {
        for (size_t place = 0; place < made.size(); ++place) {
            if (recording.made[place].first != index) continue;
            made[place] = make(recording.made[place]);
            addresses[tensors.size() + place] = get_address(made[place].get());
        }
    };
    make_for(-1);
    for (int64_t index = 0; index < static_cast<int64_t>(recording.calls.size()); ++index) {
        make_for(index);
        run_call(recording.calls[index], addresses);
        for (size_t place = 0; place < made.size(); ++place)
            if (recording.made[place].last == index) made[place].reset();
    }
    std::vector<Tensor> results;
    for (int64_t place : recording.results) results.push_back(std::move(made[place]));
    return results;
}

}  // namespace
