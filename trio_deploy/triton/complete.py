"""Where Triton repositories written before 0.2 look for `trio_vlm_complete`, which is gone."""

from trio_deploy.errors import TrioError

raise TrioError(
    "this model was removed in trio-deploy 0.2: delete its folder from the repository, or write "
    "the repository again with `trio triton BUNDLE --out FOLDER --force`, and ask the model beside "
    'it, whose name ends in `_vlm`, at /generate with "stream": false, or `trio serve`'
)
