"""Sentences that a class is put into, by the modality of a data set. Prose that models read."""

from __future__ import annotations


def _abdominal(plane: str) -> tuple[str, ...]:
    return (
        "a CT image of {}",
        f"a {plane} CT slice showing {{}}",
        "computed tomography of {}",
        "{} on an abdominal CT scan",
        f"{{}}, {plane} CT of the abdomen",
    )


TEMPLATES: dict[str, tuple[str, ...]] = {
    "histology": (
        "a histopathology image of {}",
        "an H&E stained section showing {}",
        "a photomicrograph of {}",
        "{} on hematoxylin and eosin staining",
        "a microscopic view of tissue, {}",
        "{}, histology",
    ),
    "dermatoscopy": (
        "a dermatoscopic image of {}",
        "dermoscopy showing {}",
        "a dermoscopic photograph of a skin lesion, {}",
        "{} seen through a dermatoscope",
        "{}, dermoscopy",
    ),
    "skin photograph": (
        "a clinical photograph of {}",
        "a close-up photograph of the skin showing {}",
        "a smartphone photograph of a skin lesion, {}",
        "{} on the skin of a patient",
        "{}, clinical photograph",
    ),
    "mammography": (
        "a mammogram showing {}",
        "a digital mammogram with {}",
        "mammography of a breast, {}",
        "{} on mammography",
        "{}, mammogram",
    ),
    "oct": (
        "an optical coherence tomography scan showing {}",
        "an OCT image of {}",
        "a retinal OCT scan, {}",
        "{} on optical coherence tomography",
        "{}, OCT of the macula",
    ),
    "chest radiograph": (
        "a chest radiograph showing {}",
        "a frontal chest x-ray of {}",
        "a chest x-ray, {}",
        "{} on a chest radiograph",
        "{}, plain film of the chest",
    ),
    "fundus": (
        "a fundus photograph showing {}",
        "a retinal photograph of {}",
        "a colour photograph of the fundus, {}",
        "{} on fundus photography",
        "{}, retinal image",
    ),
    "breast ultrasound": (
        "an ultrasound image of {}",
        "a breast ultrasound showing {}",
        "a sonogram of {}",
        "{} on breast ultrasound",
        "{}, sonography",
    ),
    "blood smear": (
        "a microscope image of {}",
        "a stained blood smear showing {}",
        "a photograph of {} in a peripheral blood smear",
        "{} under the microscope",
        "{}, blood film",
    ),
    "kidney cells": (
        "a microscope image of {}",
        "fluorescence microscopy of {}",
        "a kidney tissue image of {}",
        "{} in the cortex of a human kidney",
        "{}, renal tissue cytometry",
    ),
    "axial abdominal ct": _abdominal("axial"),
    "coronal abdominal ct": _abdominal("coronal"),
    "sagittal abdominal ct": _abdominal("sagittal"),
}

# What other work asks of every set, skin and OCT included.
HISTOLOGY4 = (
    "a histopathology slide showing {}",
    "histopathology image of {}",
    "pathology tissue showing {}",
    "presence of {} tissue on image",
)
