//! Named points in a plane, as a picture.

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
    let _ = plotters::style::register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    let say = |e: &dyn std::fmt::Display| e.to_string();
    let place = |p: &Point| (if log { p.x.max(1e-12).log10() } else { p.x }, p.y);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let room = ((high - low) * 0.12).max(1e-3);
        (low - room)..(high + room)
    };
    let (xs, ys) = (range(&mut points.iter().map(|p| place(p).0)), range(&mut points.iter().map(|p| place(p).1)));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (900, 480)).into_drawing_area();
        area.fill(&WHITE).map_err(|e| say(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(60)
            .build_cartesian_2d(xs, ys)
            .map_err(|e| say(&e))?;
        let label = |x: &f64| match if log { 10f64.powf(*x) } else { *x } {
            x if x >= 1e6 => format!("{:.1} M", x / 1e6),
            x if x >= 1e4 => format!("{:.0} k", x / 1e3),
            x if x >= 10.0 => format!("{x:.0}"),
            x => format!("{x:.1}"),
        };
        chart
            .configure_mesh()
            .x_desc(x_name)
            .y_desc(y_name)
            .x_label_formatter(&label)
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 16))
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(|e| say(&e))?;
        let blue = RGBColor(31, 90, 160);
        for p in points {
            let style = if p.front { blue.filled() } else { blue.stroke_width(2) };
            chart.draw_series([Circle::new(place(p), 5, style)]).map_err(|e| say(&e))?;
            let name = EmptyElement::at(place(p)) + Text::new(p.name.clone(), (8, -16), ("sans-serif", 14));
            chart.draw_series([name]).map_err(|e| say(&e))?;
        }
        area.present().map_err(|e| say(&e))?;
    }
    Ok(svg)
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
