"""A run directory: what lies in it, and who may write what.

`directory` and `manifest` say what is finished and being done, `trackers` show metrics; `versions` is what is served,
`version_files` what is published, `buckets` its bytes; `feedback` keeps answers and votes; `storage` is files on any
file system, `parts` blocks of rows. No actors here; imports go to data, training and config.
"""
