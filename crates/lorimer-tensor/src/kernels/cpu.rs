//! Which instructions of the processor the kernels use: the one place that asks it.
//!
//! The variable `LORIMER_CPU` lowers that, so that the kernels of lesser machines can be tried (and measured) on this one.

use std::sync::OnceLock;

/// The variable that lowers the level.
pub const VARIABLE: &str = "LORIMER_CPU";

/// How far the processor's vector instructions are used. Each level has those before it, but for AVX-VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of this target has.
    Plain,
    /// AVX2, FMA and F16C: registers of 256 bits.
    Avx2,
    /// AVX-VNNI: sums of products of whole numbers in registers of 256 bits. Processors with the levels above it need not have it.
    AvxVnni,
    /// AVX-512F: registers of 512 bits.
    Avx512,
    /// AVX-512 BW and VNNI: products of bytes too.
    Vnni,
}

impl Level {
    const ALL: [(&str, Self); 5] = [
        ("plain", Self::Plain),
        ("avx2", Self::Avx2),
        ("avxvnni", Self::AvxVnni),
        ("avx512", Self::Avx512),
        ("vnni", Self::Vnni),
    ];

    /// The level of a name. Fails with a sentence that has the names.
    pub fn parse(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|(own, _)| *own == name);
        found.map(|(_, level)| level).ok_or_else(|| {
            let names = Self::ALL.map(|(own, _)| own).join(", ");
            format!("{VARIABLE} `{}` should be one of {names}", name.escape_debug())
        })
    }

    /// Its name, as [`VARIABLE`] has it.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(_, level)| *level == self).map_or("plain", |(name, _)| name)
    }

    /// What the processor has.
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if !(is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            {
                return Self::Plain;
            }
            if !is_x86_feature_detected!("avx512f") {
                return if has_avx_vnni() { Self::AvxVnni } else { Self::Avx2 };
            }
            if !(is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni")) {
                return Self::Avx512;
            }
            Self::Vnni
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::Plain
    }
}

fn has_avx_vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avxvnni")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn chosen() -> &'static Result<Level, String> {
    static CHOSEN: OnceLock<Result<Level, String>> = OnceLock::new();
    CHOSEN.get_or_init(|| match std::env::var_os(VARIABLE) {
        None => Ok(Level::detect()),
        Some(name) => Level::parse(&name.to_string_lossy()).map(|most| match most.min(Level::detect()) {
            // A processor with AVX-512 need not have it.
            Level::AvxVnni if !has_avx_vnni() => Level::Avx2,
            lower => lower,
        }),
    })
}

/// The level that kernels use: the lower of the processor's and the variable's, as both were at the first call. A variable that [`check`]
/// refuses lowers nothing.
#[inline]
pub fn level() -> Level {
    match chosen() {
        Ok(level) => *level,
        Err(_) => Level::detect(),
    }
}

/// Refuses a variable that names no level, in one sentence. Programs call it before they compute.
pub fn check() -> Result<(), String> {
    chosen().as_ref().map(|_| ()).map_err(String::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_names_and_an_order() {
        assert_eq!(Level::parse("avx2"), Ok(Level::Avx2));
        assert!(Level::Plain < Level::Avx2 && Level::Avx512 < Level::Vnni);
        for bad in ["", "AVX2", "avx", "sse9", "vnni "] {
            let problem = Level::parse(bad).unwrap_err();
            assert!(problem.contains("plain, avx2, avxvnni, avx512, vnni") && problem.contains(bad), "{problem}");
        }
    }
}
