//! PEFT's names, in which adapter folders are read and written.

/// What PEFT puts before every module path.
pub const PREFIX: &str = "base_model.model.";

/// What stands between an adapted module's path and the base's parameters under the adapter.
const UNDER: &str = ".base_layer.";

/// How the parameters of PEFT's methods, and of those that only Lorimer has, begin. A name with such a part is no parameter of a base.
const METHODS: &[&str] = &[
    "adalora_",
    "bone_",
    "boft_",
    "c3a_",
    "delora_",
    "fourierft_",
    "full_weight",
    "gralora_",
    "hada_",
    "hra_",
    "hydra_",
    "ia3_",
    "ln_tuning_",
    "loldu_",
    "lokr_",
    "lora_",
    "miss_",
    "oft_",
    "osf_",
    "psoft_",
    "randlora_",
    "road_",
    "shira_",
    "sparse_gin",
    "tlora_",
    "vblora_",
    "vera_",
    "waveft_",
];

/// The name of a method's tensor, given the path that it belongs to (a module's or a block's) and its key below it.
pub fn tensor_name(path: &str, key: &str) -> String {
    format!("{PREFIX}{path}.{key}")
}

/// The name of a whole parameter, given its on-disk name in the base and whether its module has an adapter.
pub fn parameter_name(path: &str, adapted: bool) -> String {
    match path.rsplit_once('.').filter(|_| adapted) {
        Some((module, kind)) => format!("{PREFIX}{module}{UNDER}{kind}"),
        None => format!("{PREFIX}{path}"),
    }
}

/// Whether a path is that of a parameter under an adapter.
pub(crate) fn is_under_adapter(path: &str) -> bool {
    path.contains(UNDER)
}

/// The on-disk name of the parameter of the base that a path means, and whether it is the frozen weight under an adapter; None where it means
/// none. A bias under an adapter is a trained one.
pub(crate) fn whole_parameter(path: &str) -> Option<(String, bool)> {
    let (module, kind) = path.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let of_method = |part: &str| METHODS.iter().any(|method| part.starts_with(method));
    match module.split('.').any(of_method) {
        true => None,
        false => Some((path.replace(UNDER, "."), is_under_adapter(path) && kind == "weight")),
    }
}
