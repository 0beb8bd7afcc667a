package api

import (
	"errors"
	"fmt"

	"assay.dev"
)

func fromBalance(b *assay.Balance) *Balance {
	if b == nil {
		return nil
	}
	return &Balance{Since: FromTime(b.Since), In: fromWay(&b.In), Out: fromWay(&b.Out), Problem: b.Problem}
}

func fromWay(w *assay.BalanceWay) *BalanceWay {
	m := &BalanceWay{Link: fromCount(w.Link), Proxy: fromCount(w.Proxy), Exceptions: fromCount(w.Exceptions), Unexplained: w.Unexplained}
	for name, c := range w.Control {
		if m.Control == nil {
			m.Control = map[string]*FrameCount{}
		}
		m.Control[name] = fromCount(c)
	}
	return m
}

func fromCount(c assay.FrameCount) *FrameCount {
	return &FrameCount{Packets: c.Packets, Bytes: c.Bytes}
}

func (m *Balance) noun() (*assay.Balance, error) {
	if m == nil {
		return nil, nil
	}
	in, inErr := m.GetIn().noun()
	out, outErr := m.GetOut().noun()
	since, err := Time(m.GetSince())
	if err := errors.Join(inErr, outErr, err, checkText("problem", m.GetProblem())); err != nil {
		return nil, fmt.Errorf("balance: %w", err)
	}
	return &assay.Balance{Since: since, In: in, Out: out, Problem: m.GetProblem()}, nil
}

func (m *BalanceWay) noun() (assay.BalanceWay, error) {
	w := assay.BalanceWay{Link: m.GetLink().noun(), Proxy: m.GetProxy().noun(), Exceptions: m.GetExceptions().noun(), Unexplained: m.GetUnexplained()}
	if err := checkLen("kinds of control traffic", len(m.GetControl()), 64); err != nil {
		return w, err
	}
	for name, c := range m.GetControl() {
		if len(name) > 64 {
			return w, fmt.Errorf("a kind of control traffic with a name of %d bytes", len(name))
		}
		if w.Control == nil {
			w.Control = map[string]assay.FrameCount{}
		}
		w.Control[name] = c.noun()
	}
	return w, nil
}

func (m *FrameCount) noun() assay.FrameCount {
	return assay.FrameCount{Packets: m.GetPackets(), Bytes: m.GetBytes()}
}
