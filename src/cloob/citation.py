"""How to cite the paper, for model cards."""

BIBTEX = """\
@inproceedings{furst2022cloob,
  title={CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP},
  author={F{\\"u}rst, Andreas and Rumetshofer, Elisabeth and Lehner, Johannes and Tran, Viet and Tang, Fei and
    Ramsauer, Hubert and Kreil, David and Kopp, Michael and Klambauer, G{\\"u}nter and Bitto-Nemling, Angela and
    Hochreiter, Sepp},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022},
  eprint={2110.11316},
  archivePrefix={arXiv},
  primaryClass={cs.LG}
}
"""
