//! Units of a decoder's layer: key-value heads with their query heads, and channels of the gated unit. What is kept of them is one value,
//! [`KeptLayer`], from which follow the rows and columns of every projection: to gather, to scatter and to mask.

use candle_core::{Device, Result as TensorResult, Tensor};
use lorimer_model::{LayerShape, Site};
use serde::{Deserialize, Serialize};

/// Most numbers that scattering makes: a factor of rank 1,024 with a quarter of a million rows, 1 GB.
const MAX_SCATTERED: usize = 1 << 28;

/// What rows or columns of a projection belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Query heads.
    Head,
    /// Key-value heads.
    KvHead,
    /// Channels of the gated unit.
    Channel,
}

/// Which side of a weight (outputs, inputs).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Outputs.
    Rows,
    /// Inputs.
    Columns,
}

impl Axis {
    /// The dimension of a weight (outputs, inputs).
    pub fn dim(self) -> usize {
        match self {
            Self::Rows => 0,
            Self::Columns => 1,
        }
    }
}

/// Consecutive rows or columns of a projection: `count` units of `width` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// What they belong to.
    pub kind: Kind,
    /// Number of units.
    pub count: usize,
    /// Rows or columns of a unit.
    pub width: usize,
}

/// What the rows or columns of a projection belong to, by its role; None where taking units out leaves it as it is.
pub fn spans(role: &str, shape: &LayerShape) -> Option<(Axis, Vec<Span>)> {
    let span = |kind, count, width| Span { kind, count, width };
    let heads = span(Kind::Head, shape.heads, shape.head_dim);
    let kv_heads = span(Kind::KvHead, shape.kv_heads, shape.head_dim);
    let channels = span(Kind::Channel, shape.inner, 1);
    Some(match role {
        "q_proj" => (Axis::Rows, vec![heads]),
        "k_proj" | "v_proj" => (Axis::Rows, vec![kv_heads]),
        "qkv_proj" => (Axis::Rows, vec![heads, kv_heads, kv_heads]),
        "o_proj" => (Axis::Columns, vec![heads]),
        "gate_proj" | "up_proj" => (Axis::Rows, vec![channels]),
        "gate_up_proj" => (Axis::Rows, vec![channels, channels]),
        "down_proj" => (Axis::Columns, vec![channels]),
        _ => return None,
    })
}

/// How many of `count` a share is, rounded down, or up. A share such as 0.29 of 100 is 28.999… in floating point: what that alone takes off or adds does
/// not count.
pub fn share_of(share: f64, count: usize, up: bool) -> usize {
    let exact = share * count as f64;
    let rounded = if up { (exact - 1e-9).ceil() } else { (exact + 1e-9).floor() };
    rounded.max(0.0) as usize
}

/// The group (key-value head or channel) of every row or column of a projection, whether it is one of attention, and the side they are on.
pub fn groups(role: &str, shape: &LayerShape) -> Option<(Axis, bool, Vec<usize>)> {
    let (axis, spans) = spans(role, shape)?;
    let attention = spans.iter().all(|s| s.kind != Kind::Channel);
    let per_group = (shape.heads / shape.kv_heads.max(1)).max(1);
    let of = |span: Span| {
        let within = if span.kind == Kind::Head { per_group } else { 1 };
        (0..span.count).flat_map(move |unit| std::iter::repeat_n(unit / within, span.width))
    };
    Some((axis, attention, spans.into_iter().flat_map(of).collect()))
}

/// Units of a layer that are kept, each list rising. The query heads are those of the kept key-value heads, equally many of each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptLayer {
    /// Query heads.
    pub heads: Vec<usize>,
    /// Key-value heads.
    pub kv_heads: Vec<usize>,
    /// Channels.
    pub channels: Vec<usize>,
}

impl KeptLayer {
    /// All of a layer.
    pub fn whole(shape: &LayerShape) -> Self {
        Self::of_groups(shape, (0..shape.kv_heads).collect(), (0..shape.inner).collect())
    }

    /// Key-value heads with all their query heads, and channels.
    pub fn of_groups(shape: &LayerShape, kv_heads: Vec<usize>, channels: Vec<usize>) -> Self {
        let per_group = shape.heads / shape.kv_heads.max(1);
        let heads = kv_heads.iter().flat_map(|kv| kv * per_group..(kv + 1) * per_group).collect();
        Self { heads, kv_heads, channels }
    }

    /// The shape that is left of a layer.
    pub fn shape(&self, whole: &LayerShape) -> LayerShape {
        LayerShape { heads: self.heads.len(), kv_heads: self.kv_heads.len(), inner: self.channels.len(), ..*whole }
    }

    /// Refuses what is no selection of a layer's units.
    ///
    /// # Errors
    ///
    /// Gives what is wrong in words.
    pub fn check(&self, whole: &LayerShape) -> std::result::Result<(), String> {
        for (name, list, count) in [
            ("heads", &self.heads, whole.heads),
            ("kv_heads", &self.kv_heads, whole.kv_heads),
            ("channels", &self.channels, whole.inner),
        ] {
            if list.is_empty() {
                return Err(format!("keeps none of the {count} {name}"));
            }
            if list.windows(2).any(|w| w[0] >= w[1]) || list.last().is_some_and(|last| *last >= count) {
                return Err(format!("`{name}` should rise and stay below {count}"));
            }
        }
        let per_group = (whole.heads / whole.kv_heads.max(1)).max(1);
        let each = self.heads.len() / self.kv_heads.len();
        let mut groups = self.heads.chunks(each.max(1)).zip(&self.kv_heads);
        let equal = each > 0 && self.heads.len() == each * self.kv_heads.len();
        match equal && groups.all(|(heads, kv)| heads.iter().all(|head| head / per_group == *kv)) {
            true => Ok(()),
            false => Err("`heads` should be equally many of each head in `kv_heads`, and of no other".into()),
        }
    }

    fn of(&self, kind: Kind) -> &[usize] {
        match kind {
            Kind::Head => &self.heads,
            Kind::KvHead => &self.kv_heads,
            Kind::Channel => &self.channels,
        }
    }

    /// The rows or columns of a projection that are kept; None where all are, or where the role is none of a layer's.
    pub fn index(&self, role: &str, whole: &LayerShape) -> Option<(Axis, Vec<u32>)> {
        let (axis, spans) = spans(role, whole)?;
        let all: usize = spans.iter().map(|s| s.count * s.width).sum();
        let mut index = Vec::new();
        let mut begin = 0;
        for span in spans {
            let of = |unit: &usize| begin + unit * span.width..begin + (unit + 1) * span.width;
            // A model has fewer rows than 2³², and so does a record: it is checked when it is read.
            index.extend(self.of(span.kind).iter().flat_map(of).map(|i| i as u32));
            begin += span.count * span.width;
        }
        (index.len() < all).then_some((axis, index))
    }

    /// The kept part of a weight (outputs, inputs), or of a bias (outputs).
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn gather(&self, t: &Tensor, role: &str, whole: &LayerShape) -> TensorResult<Tensor> {
        match self.index(role, whole) {
            Some((axis, index)) if axis == Axis::Rows || t.dims().len() == 2 => {
                t.index_select(&Tensor::from_vec(index.clone(), index.len(), &Device::Cpu)?, axis.dim())?.contiguous()
            }
            _ => Ok(t.clone()),
        }
    }

    /// 1 where a row or column of a projection is kept and 0 elsewhere, and the side; None where all are kept.
    pub fn mask(&self, role: &str, whole: &LayerShape) -> Option<(Axis, Vec<f32>)> {
        let (axis, index) = self.index(role, whole)?;
        let all: usize = spans(role, whole)?.1.iter().map(|s| s.count * s.width).sum();
        let mut mask = vec![0f32; all];
        index.into_iter().for_each(|i| mask[i as usize] = 1.0);
        Some((axis, mask))
    }

    /// A tensor of the whole size with zeros where units were taken out: the inverse of gathering along `dim`, which is of the projection's side
    /// `axis`. Where nothing was taken out of that side it is the tensor itself.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails, or if the result would be larger than any adapter's.
    pub fn scatter(
        &self,
        t: &Tensor,
        (role, axis, dim): (&str, Axis, usize),
        whole: &LayerShape,
    ) -> TensorResult<Tensor> {
        let Some((_, index)) = self.index(role, whole).filter(|(own, _)| *own == axis) else { return Ok(t.clone()) };
        let all: usize = spans(role, whole).map_or(0, |(_, s)| s.iter().map(|s| s.count * s.width).sum());
        let mut dims = t.dims().to_vec();
        dims[dim] = all;
        let numbers = dims.iter().fold(1usize, |all, n| all.saturating_mul(*n));
        if numbers > MAX_SCATTERED {
            candle_core::bail!(
                "`{role}` of the whole base would take a tensor of {dims:?}, and at most {MAX_SCATTERED} numbers are written"
            );
        }
        let zeros = Tensor::zeros(dims, t.dtype(), t.device())?;
        zeros.index_add(&Tensor::from_vec(index.clone(), index.len(), &Device::Cpu)?, t, dim)
    }
}

/// The layer of a site among these, and its role.
pub(crate) fn layer_of<'a, T>(site: &Site, layers: &'a [T]) -> Option<&'a T> {
    layers.get(site.layer?).filter(|_| !site.is_head)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: LayerShape = LayerShape { heads: 6, kv_heads: 3, head_dim: 2, inner: 5 };

    #[test]
    fn rows_and_columns_follow_from_kept_units() {
        let kept = KeptLayer::of_groups(&WHOLE, vec![0, 2], vec![1, 4]);
        assert_eq!(kept.heads, [0, 1, 4, 5]);
        kept.check(&WHOLE).unwrap();
        let index = |role: &str| kept.index(role, &WHOLE).unwrap();
        assert_eq!(index("q_proj"), (Axis::Rows, vec![0, 1, 2, 3, 8, 9, 10, 11]));
        assert_eq!(index("k_proj"), (Axis::Rows, vec![0, 1, 4, 5]));
        assert_eq!(index("o_proj").0, Axis::Columns);
        assert_eq!(index("down_proj"), (Axis::Columns, vec![1, 4]));
        assert_eq!(index("gate_up_proj"), (Axis::Rows, vec![1, 4, 6, 9]));
        assert_eq!(index("qkv_proj").1.len(), 8 + 4 + 4);
        assert_eq!(index("qkv_proj").1[8..12], [12, 13, 16, 17]);
        assert!(kept.index("lm_head", &WHOLE).is_none() && KeptLayer::whole(&WHOLE).index("q_proj", &WHOLE).is_none());
        // Fewer query heads of each group.
        let thinner = KeptLayer { heads: vec![1, 2, 5], kv_heads: vec![0, 1, 2], channels: vec![0] };
        thinner.check(&WHOLE).unwrap();
        assert!(thinner.index("k_proj", &WHOLE).is_none());
        assert_eq!(groups("o_proj", &WHOLE).unwrap().2, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
        assert_eq!(groups("gate_up_proj", &WHOLE).unwrap().2, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
    }

    #[test]
    fn gathering_after_scattering_is_the_identity() {
        let kept = KeptLayer::of_groups(&WHOLE, vec![1], vec![0, 3]);
        let t = Tensor::arange(0f32, 4.0 * 3.0, &Device::Cpu).unwrap().reshape((4, 3)).unwrap();
        let wide = kept.scatter(&t, ("q_proj", Axis::Rows, 0), &WHOLE).unwrap();
        assert_eq!(wide.dims(), [12, 3]);
        let back = kept.gather(&wide, "q_proj", &WHOLE).unwrap();
        assert_eq!(back.to_vec2::<f32>().unwrap(), t.to_vec2::<f32>().unwrap());
        let sum = |t: &Tensor| t.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(sum(&wide), sum(&t));
        let (_, mask) = kept.mask("down_proj", &WHOLE).unwrap();
        assert_eq!(mask, [1.0, 0.0, 0.0, 1.0, 0.0]);
        // The other side of a projection is left alone.
        let same = kept.scatter(&t, ("q_proj", Axis::Columns, 1), &WHOLE).unwrap();
        assert_eq!(same.dims(), t.dims());
    }

    #[test]
    fn shares_are_those_of_exact_numbers() {
        for hundredths in 0..=100 {
            let share = hundredths as f64 / 100.0;
            assert_eq!((share_of(share, 100, false), share_of(share, 100, true)), (hundredths, hundredths));
            assert_eq!(share_of(share, 7, false), hundredths * 7 / 100);
            assert_eq!(share_of(share, 7, true), (hundredths * 7).div_ceil(100));
        }
    }

    #[test]
    fn no_more_is_scattered_than_an_adapter_holds() {
        let whole = LayerShape { heads: 1 << 14, kv_heads: 1 << 14, head_dim: 1 << 10, inner: 1 };
        let kept = KeptLayer::of_groups(&whole, vec![5], vec![0]);
        let t = Tensor::zeros((1 << 10, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
        let problem = kept.scatter(&t, ("q_proj", Axis::Rows, 0), &whole).unwrap_err().to_string();
        assert!(problem.contains("`q_proj`") && problem.contains("[16777216, 32]"), "{problem}");
    }

    #[test]
    fn what_is_no_selection_is_refused() {
        let kept = |heads: &[usize], kv: &[usize], channels: &[usize]| {
            KeptLayer { heads: heads.into(), kv_heads: kv.into(), channels: channels.into() }.check(&WHOLE)
        };
        assert!(kept(&[0, 1], &[0], &[]).unwrap_err().contains("none of the 5 channels"));
        assert!(kept(&[1, 0], &[0], &[1]).unwrap_err().contains("rise"));
        assert!(kept(&[0, 6], &[0], &[1]).unwrap_err().contains("below 6"));
        assert!(kept(&[0, 2], &[0], &[1]).unwrap_err().contains("equally many"));
        assert!(kept(&[0, 1, 2], &[0, 1], &[1]).unwrap_err().contains("equally many"));
        assert!(kept(&[0], &[0, 1], &[1]).unwrap_err().contains("equally many"));
        assert!(kept(&[0, 1, 2, 3], &[0, 2], &[1]).unwrap_err().contains("equally many"));
        assert!(kept(&[1, 5], &[0, 2], &[1]).is_ok());
    }
}
