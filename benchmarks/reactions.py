"""Well-known organic reactions as reaction SMILES: reactants and reagents >> product.

Textbook transformations of simple molecules, written for this file; rxnfp's package holds no
reaction data of its own. Each is spelled in tokens that its vocabulary has.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from models import package_directory

TOKEN = re.compile(r"\[[^\]]+]|Br?|Cl?|[NOSPFI]|[bcnosp]|[|().=#+\\/:~@?*$-]|>>?|%\d{2}|\d")
"""A token of a reaction SMILES: a bracket atom, an atom, a bond, a ring closure."""

REACTIONS = (
    # esters, amides and other acyl derivatives
    "CC(=O)O.CCO.OS(=O)(=O)O>>CCOC(C)=O",
    "O=C(O)c1ccccc1.CO.OS(=O)(=O)O>>COC(=O)c1ccccc1",
    "O=C(O)c1ccccc1O.CC(=O)OC(C)=O>>CC(=O)Oc1ccccc1C(=O)O",
    "Nc1ccc(O)cc1.CC(=O)OC(C)=O.O>>CC(=O)Nc1ccc(O)cc1",
    "Nc1ccccc1.CC(=O)Cl.CCN(CC)CC.ClCCl>>CC(=O)Nc1ccccc1",
    "OC(=O)c1ccccc1.NCc1ccccc1.CN(C)C=O.CCN(C(C)C)C(C)C>>O=C(NCc1ccccc1)c1ccccc1",
    "O=C(O)c1ccccc1.O=S(Cl)Cl>>O=C(Cl)c1ccccc1",
    "COC(=O)c1ccccc1.[OH-].[Na+].O>>O=C(O)c1ccccc1",
    "CCOC(C)=O.[Li+].[AlH4-].C1CCOC1>>CCO",
    "CC#N.O.OS(=O)(=O)O>>CC(N)=O",
    "N#Cc1ccccc1.[Li+].[AlH4-].C1CCOC1>>NCc1ccccc1",
    "Nc1ccc(C(=O)O)cc1.CCO.OS(=O)(=O)O>>CCOC(=O)c1ccc(N)cc1",
    "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCc1ccccc1.ClCCl>>CC(C)(C)OC(=O)NCc1ccccc1",
    "CC(C)(C)OC(=O)NCc1ccccc1.O=C(O)C(F)(F)F.ClCCl>>NCc1ccccc1",
    "Nc1ccccc1.CS(=O)(=O)Cl.c1ccncc1>>CS(=O)(=O)Nc1ccccc1",
    "Nc1ccccc1.O=C=Nc1ccccc1>>O=C(Nc1ccccc1)Nc1ccccc1",
    # couplings on palladium and copper
    "Brc1ccccc1.OB(O)c1ccc(C)cc1.O=C([O-])[O-].[K+].[K+].[Pd]>>Cc1ccc(-c2ccccc2)cc1",
    "Brc1ccncc1.OB(O)c1ccccc1.O=C([O-])[O-].[Na+].[Na+].[Pd]>>c1ccc(-c2ccncc2)cc1",
    "Ic1ccccc1.C#Cc1ccccc1.CCN(CC)CC.[Cu]I.[Pd]>>C(#Cc1ccccc1)c1ccccc1",
    "Ic1ccccc1.C=CC(=O)OC.CCN(CC)CC.[Pd]>>COC(=O)C=Cc1ccccc1",
    "Brc1ccccc1.C1COCCN1.CC(C)(C)[O-].[Na+].[Pd]>>c1ccc(N2CCOCC2)cc1",
    "Fc1ccc([N+](=O)[O-])cc1.C1CCNCC1.O=C([O-])[O-].[K+].[K+]>>O=[N+]([O-])c1ccc(N2CCCCC2)cc1",
    "Clc1ncccn1.NCc1ccccc1.CCN(C(C)C)C(C)C>>c1ccc(CNc2ncccn2)cc1",
    # alkylations and substitutions
    "CCBr.Oc1ccccc1.[OH-].[Na+]>>CCOc1ccccc1",
    "CI.Oc1ccc(C=O)cc1.O=C([O-])[O-].[K+].[K+].CC(C)=O>>COc1ccc(C=O)cc1",
    "BrCc1ccccc1.[C-]#N.[Na+].CS(C)=O>>N#CCc1ccccc1",
    "BrCc1ccccc1.[N-]=[N+]=[N-].[Na+].CN(C)C=O>>[N-]=[N+]=NCc1ccccc1",
    "OCc1ccccc1.BrP(Br)Br>>BrCc1ccccc1",
    "CCCCO.CS(=O)(=O)Cl.CCN(CC)CC.ClCCl>>CCCCOS(C)(=O)=O",
    "CC(C)(C)[Si](C)(C)Cl.OCc1ccccc1.c1c[nH]cn1>>CC(C)(C)[Si](C)(C)OCc1ccccc1",
    "C1CO1.C1CCNCC1>>OCCN1CCCCC1",
    # aldehydes and ketones
    "CC(C)=O.[BH4-].[Na+].CO>>CC(C)O",
    "O=Cc1ccccc1.[BH4-].[Na+].CO>>OCc1ccccc1",
    "O=Cc1ccccc1.NCc1ccccc1.[BH4-].[Na+].CO>>c1ccc(CNCc2ccccc2)cc1",
    "CC(=O)c1ccccc1.NO.Cl>>CC(=NO)c1ccccc1",
    "O=Cc1ccccc1.CC(=O)c1ccccc1.[OH-].[Na+]>>O=C(C=Cc1ccccc1)c1ccccc1",
    "O=Cc1ccccc1.C[Mg]Br.C1CCOC1>>CC(O)c1ccccc1",
    "O=Cc1ccccc1.CCOC(=O)C=P(c1ccccc1)(c1ccccc1)c1ccccc1>>CCOC(=O)C=Cc1ccccc1",
    "O=C1CCCCC1.NO.Cl>>ON=C1CCCCC1",
    "OC1CCCCC1.O=[Cr](=O)=O>>O=C1CCCCC1",
    "NNc1ccccc1.CC(C)=O>>CC(C)=NNc1ccccc1",
    # aromatic substitutions, additions, rings
    "c1ccccc1.O=[N+]([O-])O.OS(=O)(=O)O>>O=[N+]([O-])c1ccccc1",
    "c1ccccc1.CC(=O)Cl.Cl[Al](Cl)Cl>>CC(=O)c1ccccc1",
    "Oc1ccccc1.BrBr>>Oc1ccc(Br)cc1",
    "O=[N+]([O-])c1ccccc1.[H][H].[Pd].CCO>>Nc1ccccc1",
    "C=Cc1ccccc1.[H][H].[Pd].CCO>>CCc1ccccc1",
    "C=Cc1ccccc1.O=C(OO)c1cccc(Cl)c1.ClCCl>>c1ccc(C2CO2)cc1",
    "C1=CCCCC1.BrBr.ClC(Cl)(Cl)Cl>>BrC1CCCCC1Br",
    "C=CC=C.O=C1C=CC(=O)O1.c1ccccc1>>O=C1OC(=O)C2CC=CCC12",
    "[N-]=[N+]=NCc1ccccc1.C#Cc1ccccc1.[Cu]I>>c1ccc(Cn2cc(-c3ccccc3)nn2)cc1",
    "Nc1ccccc1N.OC=O>>c1ccc2[nH]cnc2c1",
)


def vocabulary(model: str) -> dict[str, int]:
    """Numbers of the tokens of one of rxnfp's models, "bert_ft" or "bert_pretrained"."""
    path = package_directory("rxnfp") / "models/transformers" / model / "vocab.txt"
    return {token: i for i, token in enumerate(path.read_text().splitlines())}


def tokenised(reactions: Iterable[str], number: Mapping[str, int]) -> dict[str, Tensor]:
    """A padded batch of reactions.

    Raises:
        ValueError: a reaction has a token that is not in the vocabulary.
    """
    rows = []
    for reaction in reactions:
        tokens = TOKEN.findall(reaction)
        if "".join(tokens) != reaction or not set(tokens) <= set(number):
            raise ValueError(
                f"{reaction} has tokens that rxnfp does not know: write it with others"
            )
        rows.append([number[t] for t in ("[CLS]", *tokens, "[SEP]")])
    width = max(map(len, rows))
    padded = torch.tensor([row + [number["[PAD]"]] * (width - len(row)) for row in rows])
    return {"input_ids": padded, "attention_mask": (padded != number["[PAD]"]).long()}
