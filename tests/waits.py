"What makes Python wait for a GPU, counted on CPU tensors."
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten, T = torch.ops.aten, torch.Tensor
asking = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_numpy, aten.masked_select,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount}
indexing = {aten.index, aten.index_put, aten.index_put_}


class Waits(TorchDispatchMode):
    "Counts what waits for a GPU: operations whose values or sizes Python needs, and copies between host and device"
    def __init__(self):
        super().__init__()
        self.found, self.calls = [], _Copies(self)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.calls.__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func.overloadpacket
        masks = op in indexing and any(o is not None and o.dtype in (torch.bool, torch.uint8) for o in args[1])
        if op in asking or masks: self.found.append(str(op))
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    "Copies, which on CPU tensors are no operation"
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_device = func in (torch.tensor, torch.as_tensor) and kwargs.get('device') is not None
        if func in (T.cpu, T.numpy, T.tolist) or to_device: self.waits.found.append(func.__name__)
        return func(*args, **kwargs)
