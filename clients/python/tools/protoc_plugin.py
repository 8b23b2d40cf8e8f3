"""A protoc plugin out of what protoc itself contains: grpcio-tools brings the generators `python` and `grpc_python` built
into its protoc only, and buf wants programs that read a request and write an answer.

Usage: protoc_plugin.py GENERATOR
"""

import sys
import tempfile
from pathlib import Path

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc


def generate(generator: str, request: CodeGeneratorRequest) -> CodeGeneratorResponse:
    """The files that protoc writes for this request."""
    response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
    with tempfile.TemporaryDirectory() as directory:
        descriptors = Path(directory, "descriptors")
        descriptors.write_bytes(FileDescriptorSet(file=request.proto_file).SerializeToString())
        out = Path(directory, "out")
        out.mkdir()
        status = protoc.main(
            [
                "protoc",
                f"--descriptor_set_in={descriptors}",
                f"--{generator}_out={out}",
                *request.file_to_generate,
            ]
        )
        if status != 0:
            response.error = f"protoc ended with status {status}"
        for path in sorted(out.rglob("*.py")):
            response.file.add(name=path.relative_to(out).as_posix(), content=path.read_text("utf-8"))
    return response


if __name__ == "__main__":
    answer = generate(sys.argv[1], CodeGeneratorRequest.FromString(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(answer.SerializeToString())
