// Operators that do again what they did in Python, without Python.
//
// An operator runs in Python when it gets a kind of arguments for the first time: types, sizes, strides and numbers. The
// second time repeat.py records what the operator asks of memory and of kernels; that takes longer, so shapes that never
// come again are not recorded. From then on the operator does the same again, of other data: 6 us for a convolution,
// and 28 us in Python.
//
// torch calls an operator with a stack of 8 bytes for each argument, through its stable C interface.

#include "recordings.h"

namespace {

struct Operator {
    std::string name, in_python, kinds;  // a letter for each argument: see `describe`
    bool returns_list;
};

// What Python says of the operator that runs in it; null: nobody listens.
thread_local Recording* heard = nullptr;
thread_local std::string failure;          // of the operator that ran in Python last
thread_local bool has_failed = false;
thread_local bool is_invalid = false;      // of a failure: an argument is wrong
thread_local bool is_interrupted = false;  // Ctrl-C came while an operator ran in Python
void (*interrupt_python)() = nullptr;

template <typename T>
void append(std::string& key, const T& value) {
    key.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void describe_tensor(AtenTensorHandle tensor, std::string& key) {
    int64_t dims = 0, *size = nullptr, *stride = nullptr;
    int32_t dtype = 0, device = 0;
    check(aoti_torch_get_dim(tensor, &dims), "count dimensions");
    check(aoti_torch_get_sizes(tensor, &size), "read sizes");
    check(aoti_torch_get_strides(tensor, &stride), "read strides");
    check(aoti_torch_get_dtype(tensor, &dtype), "read a type");
    check(aoti_torch_get_device_type(tensor, &device), "read a device");
    append(key, dims);
    append(key, dtype);
    append(key, device);
    key.append(reinterpret_cast<const char*>(size), dims * sizeof(int64_t));
    key.append(reinterpret_cast<const char*>(stride), dims * sizeof(int64_t));
}

// Add an argument to the key, and the tensor, if it is one: t tensor, o tensor or none, s text, l list of numbers,
// i anything that is a number.
void describe(char kind, StableIValue given, std::string& key, std::vector<AtenTensorHandle>& tensors) {
    if (kind == 'i') return append(key, given);
    if (kind == 'o') {
        append(key, given != 0);
        if (given == 0) return;
        given = *reinterpret_cast<StableIValue*>(given);
        kind = 't';
    }
    if (kind == 't') {
        auto tensor = reinterpret_cast<AtenTensorHandle>(given);
        tensors.push_back(tensor);
        return describe_tensor(tensor, key);
    }
    size_t length = 0;
    if (kind == 's') {
        const char* text = nullptr;
        auto handle = reinterpret_cast<StringHandle>(given);
        check(torch_string_length(handle, &length), "read a text");
        check(torch_string_c_str(handle, &text), "read a text");
        append(key, length);
        key.append(text, length);
        return;
    }
    auto list = reinterpret_cast<StableListHandle>(given);
    check(torch_list_size(list, &length), "read a list");
    append(key, length);
    for (size_t place = 0; place < length; ++place) {
        StableIValue value = 0;
        check(torch_list_get_item(list, place, &value), "read a list");
        append(key, value);
    }
}

void free_argument(char kind, StableIValue given) {
    if (kind == 't') aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(given));
    if (kind == 's') torch_delete_string(reinterpret_cast<StringHandle>(given));
    if (kind == 'l') torch_delete_list(reinterpret_cast<StableListHandle>(given));
    if (kind == 'o' && given != 0) {
        auto* inner = reinterpret_cast<StableIValue*>(given);
        aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(*inner));
        delete inner;
    }
}

// The arguments of a call, which the callee frees.
struct Arguments {
    const Operator& called;
    StableIValue* stack;
    bool are_passed_on = false;

    ~Arguments() {
        for (size_t place = 0; !are_passed_on && place < called.kinds.size(); ++place)
            free_argument(called.kinds[place], stack[place]);
    }
};

void give_back(const Operator& called, std::vector<Tensor>&& results, StableIValue* stack) {
    if (!called.returns_list) {
        stack[0] = reinterpret_cast<StableIValue>(results[0].release());
        return;
    }
    StableListHandle list = nullptr;
    check(torch_new_list_reserve_size(results.size(), &list), "make a list");
    for (Tensor& result : results)
        check(torch_list_push_back(list, reinterpret_cast<StableIValue>(result.release())), "fill a list");
    stack[0] = reinterpret_cast<StableIValue>(list);
}

// torch 2.11 to 2.14 never frees a text that is passed on, so texts cross as lists of their bytes.
void pass_on(const Operator& called, StableIValue* stack) {
    for (size_t place = 0; place < called.kinds.size(); ++place) {
        if (called.kinds[place] != 's') continue;
        auto text = reinterpret_cast<StringHandle>(stack[place]);
        size_t length = 0;
        const char* bytes = nullptr;
        StableListHandle list = nullptr;
        check(torch_string_length(text, &length), "read a text");
        check(torch_string_c_str(text, &bytes), "read a text");
        check(torch_new_list_reserve_size(length, &list), "make a list");
        for (size_t index = 0; index < length; ++index)
            check(torch_list_push_back(list, static_cast<unsigned char>(bytes[index])), "fill a list");
        torch_delete_string(text);
        stack[place] = reinterpret_cast<StableIValue>(list);
    }
}

// Let Python compute the results, and keep what Python says of the call.
void run_in_python(const Operator& called, StableIValue* stack, const std::string& key, const Recording* found) {
    Recording recording{found == nullptr ? State::once : State::python};
    Recording* outer = heard;
    heard = found != nullptr && found->state == State::once ? &recording : nullptr;
    has_failed = false;
    pass_on(called, stack);
    auto error = aoti_torch_call_dispatcher(called.in_python.c_str(), "", stack);
    heard = outer;
    if (std::exchange(is_interrupted, false)) interrupt_python();  // when the operator has ended
    if (std::exchange(has_failed, false)) {
        if (error == AOTI_TORCH_SUCCESS) free_argument(called.returns_list ? 'l' : 't', stack[0]);
        if (is_invalid) throw std::invalid_argument(failure);  // a ValueError
        throw std::runtime_error(failure);
    }
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(called.in_python + " was interrupted");
    if (found == nullptr || found->state == State::once) memory().keep(key, std::move(recording));
}

std::string describe_call(const Operator& called, const StableIValue* stack, std::vector<AtenTensorHandle>& tensors) {
    std::string key;
    key.reserve(1024);
    uint32_t threads = 0;
    check(torch_get_num_threads(&threads), "count threads");
    append(key, &called);
    append(key, threads);
    for (size_t place = 0; place < called.kinds.size(); ++place)
        describe(called.kinds[place], stack[place], key, tensors);
    return key;
}

void run(const Operator& called, StableIValue* stack) {
    std::vector<Tensor> results;
    {
        Arguments arguments{called, stack};
        std::vector<AtenTensorHandle> tensors;
        const std::string key = describe_call(called, stack, tensors);
        auto found = memory().find(key);
        if (found == nullptr || found->state != State::repeats) {
            arguments.are_passed_on = true;
            return run_in_python(called, stack, key, found.get());
        }
        results = repeat(*found, tensors);
    }
    give_back(called, std::move(results), stack);  // in the place of an argument, which is free now
}

constexpr int MOST_OPERATORS = 16;
Operator* operators[MOST_OPERATORS] = {};
int known = 0;

// torch calls a function, and does not say of which operator.
template <int place>
void run_operator(StableIValue* stack, uint64_t, uint64_t) {
    run(*operators[place], stack);
}

using Function = void (*)(StableIValue*, uint64_t, uint64_t);

template <int... places>
Function find_function(int place, std::integer_sequence<int, places...>) {
    static constexpr Function functions[] = {run_operator<places>...};
    return functions[place];
}

}  // namespace

extern "C" {

// Let torch call this library for an operator on the CPU; return 0, or a torch error.
int32_t add_operator(const char* name, const char* in_python, const char* kinds, int64_t returns_list) {
    static TorchLibraryHandle library = nullptr;  // never freed: torch would forget the operators
    for (int place = 0; place < known; ++place)
        if (operators[place]->name == name) return AOTI_TORCH_SUCCESS;
    if (known == MOST_OPERATORS) return AOTI_TORCH_FAILURE;
    if (library == nullptr) {
        auto error = aoti_torch_library_init_impl("qcompiler", "CPU", "repeat.cpp", 1, &library);
        if (error != AOTI_TORCH_SUCCESS) return error;
    }
    operators[known] = new Operator{name, in_python, kinds, returns_list != 0};
    auto function = find_function(known++, std::make_integer_sequence<int, MOST_OPERATORS>());
    return aoti_torch_library_impl(library, name, function);
}

// What follows is said while an operator runs in Python, in the order of the calls.

// Return whether anybody listens; what was said before is forgotten.
int64_t start_recording() {
    if (heard != nullptr) *heard = Recording{State::python};
    return heard != nullptr;
}

void add_made(int64_t dims, const int64_t* size, const int64_t* stride, int64_t type, int64_t first, int64_t last) {
    const int32_t types[] = {
        aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_int8(), aoti_torch_dtype_uint8()};
    heard->made.push_back({{size, size + dims}, {stride, stride + dims}, types[type], first, last});
}

void add_call(void* kernel) {
    heard->calls.emplace_back();
    heard->calls.back().kernel = reinterpret_cast<Kernel>(kernel);
}

void add_number(int64_t number) {
    Call& call = heard->calls.back();
    call.arguments[call.count++] = number;
}

void add_structure(const char* bytes, int64_t length) {
    Call& call = heard->calls.back();
    call.structures.resize((call.structures.size() + 15) / 16 * 16);
    call.is_structure[call.count] = true;
    add_number(static_cast<int64_t>(call.structures.size()));
    call.structures.insert(call.structures.end(), bytes, bytes + length);
}

// Write an address at an offset of the last structure; at -1 the address is the last argument.
void add_address(int64_t offset, int64_t tensor, int64_t shift) {
    Call& call = heard->calls.back();
    call.places.push_back({call.count - 1, offset, tensor, shift});
}

void finish(int64_t count, const int64_t* results) {
    heard->results.assign(results, results + count);
    heard->state = State::repeats;
}

void fail(const char* text, int64_t is_wrong_argument) {
    failure = text;
    has_failed = true;
    is_invalid = is_wrong_argument != 0;
}

void set_interrupt(void (*function)()) { interrupt_python = function; }

// Let Python raise what Ctrl-C raises, but behind the operator: it could not pass through C++.
void interrupt_later() { is_interrupted = true; }

void forget() { memory().forget(); }

int64_t count_recordings() { return memory().count(); }
}
