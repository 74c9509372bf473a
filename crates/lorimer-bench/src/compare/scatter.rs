//! Named points in a plane, as a picture.

use lorimer_train::run::chart::{self, Frame};
use plotters::prelude::*;

/// One point.
pub struct Point {
    /// Abscissa.
    pub x: f64,
    /// Ordinate.
    pub y: f64,
    /// What stands beside it.
    pub name: String,
    /// Whether it is filled.
    pub front: bool,
}

/// An SVG of the points; `log` for an abscissa by powers of ten. Empty where there are no points.
pub fn scatter(points: &[Point], x_name: &str, y_name: &str, log: bool) -> Result<String, String> {
    if points.is_empty() {
        return Ok(String::new());
    }
    let place = |p: &Point| (if log { p.x.max(1e-12).log10() } else { p.x }, p.y);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let room = ((high - low) * 0.12).max(1e-3);
        (low - room)..(high + room)
    };
    let (xs, ys) = (range(&mut points.iter().map(|p| place(p).0)), range(&mut points.iter().map(|p| place(p).1)));
    let label = |x: &f64| match if log { 10f64.powf(*x) } else { *x } {
        x if x >= 1e6 => format!("{:.1} M", x / 1e6),
        x if x >= 1e4 => format!("{:.0} k", x / 1e3),
        x if x >= 10.0 => format!("{x:.0}"),
        x => format!("{x:.1}"),
    };
    let frame =
        Frame { size: (900, 480), title: None, x: (x_name, xs), y: (y_name, ys), x_label: Some(&label), legend: false };
    chart::svg(&frame, |chart| {
        let blue = RGBColor(31, 90, 160);
        for p in points {
            let style = if p.front { blue.filled() } else { blue.stroke_width(2) };
            chart.draw_series([Circle::new(place(p), 5, style)]).map_err(chart::message)?;
            let name = EmptyElement::at(place(p)) + Text::new(p.name.clone(), (8, -16), ("sans-serif", 14));
            chart.draw_series([name]).map_err(chart::message)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_in_the_picture() {
        let point = |x: f64, name: &str| Point { x, y: x / 2.0, name: name.into(), front: x > 10.0 };
        let svg = scatter(&[point(5.0, "one"), point(5000.0, "two")], "parameters", "accuracy", true).unwrap();
        assert!(svg.contains("one") && svg.contains("two") && svg.contains("parameters"));
        assert!(scatter(&[], "x", "y", false).unwrap().is_empty());
    }
}
