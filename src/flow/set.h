/*-------------------------------------------------------------------------
 *
 * set.h
 *	  Call a set handler: its items as an array, its answer as outcomes.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_SET_H
#define REDRIVE_SET_H

#include "utils/tuplestore.h"

#include "flow/segment.h"

extern bool redrive_check_set_result(Oid funcid);
extern Datum redrive_set_argument(RedriveCall *call, int from, int to);
extern Tuplestorestate *redrive_call_for_outcomes(RedriveCall *call);
extern void redrive_take_outcomes(RedriveCall *call, Tuplestorestate *rows, int from, int to);

#endif							/* REDRIVE_SET_H */
