"""Run directories in buckets: what a run does with a URI where it has a folder otherwise.

uri       which texts are URIs, and the file systems behind them
objects   the bucket as this package uses it: whole objects, put, listed, read
lease     one driver at a time, and in which order they came
log       a ledger as a sequence of objects, and who may add to it
files     everything else that a run writes, as snapshots
journal   what the oracle's replicas have answered
calls     what a judge was asked and has cost
place     the run directory as collector and driver see it, local or not
"""

from rayalign.storage.calls import BucketCalls
from rayalign.storage.journal import open_journal
from rayalign.storage.place import (
    Place,
    fetched,
    fetched_ledger,
    folder_of,
    gathered,
    holds,
    open_place,
    publish,
    publish_all,
    release,
    replace_folder,
    resume,
    scratch_of,
    take,
    upload,
)
from rayalign.storage.uri import absolute, in_bucket, join, last_name, local_only, plain, ray_storage

__all__ = [
    "BucketCalls",
    "Place",
    "absolute",
    "fetched",
    "fetched_ledger",
    "folder_of",
    "gathered",
    "holds",
    "in_bucket",
    "join",
    "last_name",
    "local_only",
    "open_journal",
    "open_place",
    "plain",
    "publish",
    "publish_all",
    "ray_storage",
    "release",
    "replace_folder",
    "resume",
    "scratch_of",
    "take",
    "upload",
]
