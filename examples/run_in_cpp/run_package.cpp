// Run an AOTInductor package without Python:
//
//     run_package model.pt2 inputs.pt outputs.pt
//
// inputs.pt is a list of tensors, in the order of the model's inputs, as torch.save(list) writes it;
// outputs.pt becomes a tuple, for torch.load. Nothing here knows of bda_fx: the package is plain ATen.

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  return tensors;
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  const std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) {
    throw std::runtime_error("cannot write " + path);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package model.pt2 inputs.pt outputs.pt\n";
    return 2;
  }
  try {
    const at::NoGradGuard no_grad;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const std::vector<at::Tensor> outputs = model.run(read_tensors(argv[2]));
    for (const at::Tensor& output : outputs) {
      std::cout << output.toString() << ' ' << output.sizes() << '\n';
    }
    write_tensors(argv[3], outputs);
  } catch (const c10::Error& error) {
    std::cerr << argv[1] << ": " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
